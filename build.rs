//! Tells the binaries what they were built from. Every fact degrades to `unknown`: a source archive without its
//! history builds as well.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Development builds are not remade for each commit; releases tell the truth.
    if std::env::var("PROFILE").as_deref() == Ok("release")
        && let Some(log) = output("git", &["rev-parse", "--git-path", "logs/HEAD"])
        && std::path::Path::new(&log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    for (name, value) in [
        ("RAFSD_GIT_COMMIT", output("git", &["rev-parse", "HEAD"])),
        // The time of the commit, not of the build: the same source gives the same binary.
        (
            "RAFSD_BUILD_TIME",
            output("git", &["show", "--no-patch", "--format=%cI", "HEAD"]),
        ),
        ("RAFSD_PROFILE", std::env::var("PROFILE").ok()),
        ("RAFSD_RUSTC", output(&rustc, &["--version"])),
    ] {
        println!(
            "cargo::rustc-env={name}={}",
            value.as_deref().unwrap_or("unknown")
        );
    }
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}
