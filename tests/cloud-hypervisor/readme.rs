//! `README.md` against the modules.

const README: &str = include_str!("README.md");
const MAIN: &str = include_str!("main.rs");

#[test]
fn every_scenario_has_a_twin() {
    let mut modules = Vec::new();
    for line in README
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| scenario"))
    {
        let module = line.trim_end_matches('|').rsplit('|').next().unwrap();
        let module = module.trim().trim_matches('`').to_owned();
        let path = format!(
            "{}/tests/cloud-hypervisor/{module}.rs",
            env!("CARGO_MANIFEST_DIR")
        );
        let source = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        for test in ["twin", "real"] {
            assert!(
                source.contains(&format!("#[test]\nfn {test}()")),
                "{module} has no test `{test}`"
            );
        }
        modules.push(module);
    }
    for line in MAIN.lines().filter_map(|line| line.strip_prefix("mod ")) {
        let module = line.trim_end_matches(';').to_owned();
        let support = ["machine", "readme", "twins"].contains(&module.as_str());
        assert_eq!(modules.contains(&module), !support, "{module} in README.md");
    }
    assert_eq!(modules.len(), 8);
}
