//! The initial RAM disk of a guest: busybox, kernel modules and the agent `init.sh`. It is the guest's root too, so a
//! guest never hangs with the device under test.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::cache::Cache;
use crate::cpio::Archive;
use crate::debian::{Apt, Suite};
use crate::kernel::{Kernel, Modules};

/// The agent.
const INIT: &str = include_str!("init.sh");

/// Loads one of [`ON_DEMAND`] with all it needs.
const LOAD: &str = "#!/bin/sh
for module in $(cat \"/modules/$1.list\"); do
    grep -q \"^$module \" /proc/modules || insmod \"/modules/$module.ko\" || exit
done
";

/// Modules of every guest.
const AT_BOOT: &[&str] = &["virtio_pci", "virtio_console", "virtiofs", "overlay"];

/// Modules that a command may ask for with `load NAME`.
pub const ON_DEMAND: &[&str] = &["erofs", "loop", "virtio_blk"];

/// The statically linked busybox of this Debian release.
pub fn busybox(cache: &Cache) -> Result<PathBuf> {
    let root = cache.entry("busybox", |into| {
        Apt::update(cache, &Suite::of_this_machine()?)?.unpack(&["busybox-static"], into)
    })?;
    ["usr/bin/busybox", "bin/busybox"]
        .iter()
        .map(|path| root.join(path))
        .find(|path| path.exists())
        .with_context(|| format!("no busybox in {}", root.display()))
}

/// The initial RAM disk for guests with this kernel.
pub fn prepare(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = busybox(cache)?;
    // The name changes with all that is put in from here, so a new version never meets an old file.
    let mut recipe = Sha256::new();
    for part in [INIT, LOAD, kernel.release()]
        .iter()
        .chain(AT_BOOT)
        .chain(ON_DEMAND)
    {
        recipe.update(part.as_bytes());
        recipe.update([0]);
    }
    let mut name = format!("initrd-{}-{}", kernel.release(), hex::encode(recipe.finalize()));
    name.truncate(name.len() - 48);
    cache.entry(&name, |path| write(path, &busybox, &kernel.modules()?))
}

fn write(path: &Path, busybox: &Path, modules: &Modules) -> Result<()> {
    let mut archive = Archive::new(std::io::BufWriter::new(fs::File::create(path)?));
    for directory in ["bin", "dev", "modules"] {
        archive.directory(directory)?;
    }
    // The kernel opens it for the first process before anything is mounted.
    archive.character_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    archive.symlink("bin/sh", "busybox")?;
    archive.file("bin/load", 0o755, LOAD.as_bytes())?;
    archive.file("init", 0o755, INIT.as_bytes())?;

    let mut written: Vec<String> = Vec::new();
    let mut boot: Vec<String> = Vec::new();
    for name in AT_BOOT.iter().chain(ON_DEMAND) {
        let mut list = String::new();
        for module in modules.closure(name)? {
            writeln!(list, "{}", module.name)?;
            if AT_BOOT.contains(name) && !boot.contains(&module.name) {
                boot.push(module.name.clone());
            }
            if !written.contains(&module.name) {
                archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.bytes)?;
                written.push(module.name);
            }
        }
        archive.file(&format!("modules/{name}.list"), 0o644, list.as_bytes())?;
    }
    archive.file("modules/boot", 0o644, (boot.join("\n") + "\n").as_bytes())?;
    archive
        .finish()?
        .into_inner()
        .context("write the initial RAM disk")?;
    Ok(())
}
