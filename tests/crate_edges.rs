//! Which crate may use which is written down in `docs/architecture.md`. The manifests must say the same.

#![allow(clippy::expect_used, clippy::indexing_slicing)] // a test may end loudly

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

type Edges = BTreeSet<(String, String)>;

/// Reads `root → {a, b}, c → d.` behind "no circle:".
fn written_down() -> Edges {
    let text = include_str!("../docs/architecture.md");
    let (_, sentence) = text
        .split_once("no circle:")
        .expect("the architecture lists the edges");
    let (sentence, _) = sentence.split_once(". ").expect("the list ends");
    let mut edges = Edges::new();
    let mut rest = sentence.trim();
    while let Some((from, to)) = rest.split_once('→') {
        let from = from.trim_matches([',', ' ', '\n']);
        let to = to.trim_start();
        let (list, behind) = match to.strip_prefix('{') {
            Some(list) => list.split_once('}').expect("a closed brace"),
            None => to.split_once(',').unwrap_or((to, "")),
        };
        edges.extend(list.split(',').map(|to| (from.to_owned(), to.trim().to_owned())));
        rest = behind;
    }
    edges
}

/// The short name of a crate of the product: the name of its folder. `None` for crates under `tests/`.
fn room(package: &Value) -> Option<String> {
    let manifest = Path::new(package["manifest_path"].as_str()?);
    let folder = manifest.parent()?.strip_prefix(env!("CARGO_MANIFEST_DIR")).ok()?;
    match folder.to_str()? {
        "" => Some("root".into()),
        test if test.starts_with("tests/") => None,
        room => Some(room.into()),
    }
}

fn in_manifests() -> (Edges, Vec<String>) {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let named = |name: &Value| packages.iter().find(|package| package["name"] == *name);
    let mut edges = Edges::new();
    let mut wrong = Vec::new();
    for package in packages {
        let Some(from) = room(package) else {
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let Some(target) = named(&dependency["name"]) else {
                continue;
            };
            let for_tests = dependency["kind"] == "dev";
            match room(target) {
                Some(to) if !for_tests => drop(edges.insert((from.clone(), to))),
                None if !for_tests => wrong.push(format!("{from} uses {}", target["name"])),
                _ => {}
            }
        }
    }
    (edges, wrong)
}

#[test]
fn crates_use_each_other_as_the_architecture_says() {
    let (edges, wrong) = in_manifests();
    assert_eq!(edges, written_down());
    assert_eq!(
        wrong,
        Vec::<String>::new(),
        "the product must not use crates for tests"
    );
}
