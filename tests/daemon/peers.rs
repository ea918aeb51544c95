//! Where other daemons are that ours is compared with.

use std::path::{Path, PathBuf};

/// `virtiofsd`: of `$VIRTIOFSD`, of `make peers`, or of the machine. Says that the test is skipped if there is none.
pub fn virtiofsd(test: &str) -> Option<PathBuf> {
    let given = std::env::var_os("VIRTIOFSD").map(PathBuf::from);
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin/virtiofsd");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let of_path = std::env::split_paths(&path).map(|directory| directory.join("virtiofsd"));
    let found = given
        .into_iter()
        .chain([built, "/usr/libexec/virtiofsd".into()])
        .chain(of_path)
        .find(|program| program.is_file());
    if found.is_none() {
        println!("SKIPPED: {test}: there is no virtiofsd to compare with (make peers)");
    }
    found
}
