//! What clients of the incumbent rely on, row by row: each test is named after its row in `docs/contract.md`.

mod command_lines;
mod endpoints;
mod environment;
mod exit_codes;
mod flags;
mod flaws;
mod logs;
mod mounts;
mod sockets;
mod states;
mod wire;

use std::collections::BTreeSet;

/// The modules of this one, with their texts.
const MODULES: [(&str, &str); 11] = [
    ("command_lines", include_str!("contract/command_lines.rs")),
    ("endpoints", include_str!("contract/endpoints.rs")),
    ("environment", include_str!("contract/environment.rs")),
    ("exit_codes", include_str!("contract/exit_codes.rs")),
    ("flags", include_str!("contract/flags.rs")),
    ("flaws", include_str!("contract/flaws.rs")),
    ("logs", include_str!("contract/logs.rs")),
    ("mounts", include_str!("contract/mounts.rs")),
    ("sockets", include_str!("contract/sockets.rs")),
    ("states", include_str!("contract/states.rs")),
    ("wire", include_str!("contract/wire.rs")),
];

/// `docs/contract.md` lists these tests: all of them, and no others.
#[test]
fn the_documentation_lists_every_test() {
    let there: BTreeSet<String> = MODULES
        .into_iter()
        .flat_map(|(module, text)| {
            let lines: Vec<&str> = text.lines().collect();
            let names: Vec<String> = lines
                .windows(2)
                .filter(|pair| pair[0] == "#[test]")
                .map(|pair| pair[1].strip_prefix("fn ").unwrap().split('(').next().unwrap())
                .map(|name| format!("{module}::{name}"))
                .collect();
            names
        })
        .collect();
    let document = include_str!("../../docs/contract.md");
    let listed: BTreeSet<String> = document
        .lines()
        .filter(|line| line.starts_with("| "))
        .flat_map(|line| line.rsplit('|').nth(1).unwrap().split('`').skip(1).step_by(2))
        .map(str::to_owned)
        .collect();
    let missing: Vec<_> = there.difference(&listed).collect();
    assert!(missing.is_empty(), "not in docs/contract.md: {missing:#?}");
    let gone: Vec<_> = listed.difference(&there).collect();
    assert!(gone.is_empty(), "in docs/contract.md, but no tests: {gone:#?}");
}
