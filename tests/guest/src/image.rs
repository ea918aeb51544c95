//! Images built with `rafs build`, and the trees to build them from.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Guest;
use crate::cache::{Cache, entries};
use crate::debian::{self, output};
use crate::initrd::busybox;

/// A built image: a bootstrap and the blobs that it names.
#[derive(Clone, Debug)]
pub struct Image {
    /// The metadata.
    pub bootstrap: PathBuf,
    /// The data, each file named by its digest.
    pub blobs: Vec<PathBuf>,
    /// The directory with the data.
    pub directory: PathBuf,
}

impl Image {
    /// Builds an image of `tree` into the directory `into`.
    pub fn build(rafs: &Path, tree: &Path, into: &Path) -> Result<Self> {
        output(
            Command::new(rafs)
                .arg("build")
                .arg(tree)
                .arg("--output")
                .arg(into),
        )?;
        let (bootstrap, blobs) = (into.join("bootstrap"), into.join("blobs"));
        Ok(Self {
            bootstrap,
            blobs: entries(&blobs)?,
            directory: blobs,
        })
    }

    /// Size of all blobs together, in bytes: what a registry stores and transfers.
    pub fn size(&self) -> Result<u64> {
        self.blobs.iter().map(|blob| Ok(fs::metadata(blob)?.len())).sum()
    }
}

/// A Debian system with Python.
pub fn python_tree(cache: &Cache) -> Result<PathBuf> {
    debian::tree(cache, "tree-python3", &["python3"])
}

/// The same with `stress-ng` and `fio`.
pub fn stress_tree(cache: &Cache) -> Result<PathBuf> {
    let python = python_tree(cache)?;
    debian::with_programs(cache, "tree-stress", &python, &["stress-ng", "fio"])
}

/// A small system of one statically linked program, busybox, under all of its names.
pub fn busybox_tree(cache: &Cache) -> Result<PathBuf> {
    let program = busybox(cache)?;
    cache.entry("tree-busybox", |root| {
        for directory in ["bin", "dev", "etc", "proc", "tmp"] {
            fs::create_dir_all(root.join(directory))?;
        }
        fs::copy(&program, root.join("bin/busybox")).context("copy busybox")?;
        let names = output(Command::new(&program).arg("--list"))?;
        for name in names.lines().filter(|name| *name != "busybox") {
            symlink("busybox", root.join("bin").join(name))?;
        }
        fs::write(root.join("etc/os-release"), "NAME=busybox\n")?;
        Ok(())
    })
}

/// The script that lists a tree, for [`Manifest`]; a guest runs it with the tree's path as its argument.
pub const MANIFEST: &str = include_str!("manifest.sh");

/// Everything in a tree, with attributes and content digests.
#[derive(Debug, PartialEq, Eq)]
pub struct Manifest {
    lines: Vec<String>,
}

impl Manifest {
    /// Lists a tree of this host.
    pub fn of_host(cache: &Cache, tree: &Path) -> Result<Self> {
        let busybox = busybox(cache)?;
        // The same programs as in a guest, not the machine's own.
        let programs = tempfile::tempdir()?;
        output(
            Command::new(&busybox)
                .args(["--install", "-s"])
                .arg(programs.path()),
        )?;
        let mut list = Command::new(busybox);
        list.args(["sh", "-c", MANIFEST, "manifest"])
            .arg(tree)
            .env("PATH", programs.path());
        Ok(Self::parse(&output(&mut list)?))
    }

    /// Lists a tree that a guest has mounted.
    pub fn of_guest(guest: &mut Guest, tree: &str) -> Result<Self> {
        // Reading everything under emulation takes its time on a busy machine.
        let listed = guest.run_within(Duration::from_secs(900), &format!("set -- {tree}\n{MANIFEST}"))?;
        ensure!(
            listed.status == 0,
            "cannot list {tree} in the guest: {}",
            listed.text
        );
        Ok(Self::parse(&listed.text))
    }

    fn parse(text: &str) -> Self {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        Self { lines }
    }

    /// Number of lines.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether the tree could not be listed at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The first lines that only one of the two has, for a reader; empty if they are equal.
    #[must_use]
    pub fn difference(&self, other: &Self) -> String {
        let only = |ours: &Self, theirs: &Self, mark: char| -> Vec<String> {
            let theirs: HashSet<&String> = theirs.lines.iter().collect();
            ours.lines
                .iter()
                .filter(|line| !theirs.contains(line))
                .map(|line| format!("{mark} {line}"))
                .take(20)
                .collect()
        };
        [only(self, other, '-'), only(other, self, '+')]
            .concat()
            .join("\n")
    }
}
