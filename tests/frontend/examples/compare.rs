//! Compares the tree below DIRECTORY of whatever device listens on SOCKET with an `expected.json`.

use rafsd_frontend::tree::{Walk, differences};
use rafsd_frontend::{Error, Guest, Options, Result};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, directory, expected] = args.as_slice() else {
        return Err(Error::Usage("compare SOCKET DIRECTORY EXPECTED".into()));
    };
    let text = std::fs::read(expected).map_err(|e| Error::Usage(format!("{expected}: {e}")))?;
    let expected = serde_json::from_slice(&text).map_err(|e| Error::Usage(format!("{expected}: {e}")))?;
    let strict_length = std::env::var_os("PROBE_LOOSE").is_none();
    let guest = Guest::boot(
        socket,
        Options {
            strict_length,
            ..Options::default()
        },
    )?;
    let top = guest.resolve(directory)?.nodeid;
    let tree = Walk::default().run(&guest, top)?;
    let lines = differences(&tree, &expected);
    println!(
        "{} nodes, {} differences, {:?}",
        tree.len(),
        lines.len(),
        guest.counts()
    );
    for line in lines {
        println!("{line}");
    }
    Ok(())
}
