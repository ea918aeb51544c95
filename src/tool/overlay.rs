//! The mount helper of containerd for mounts of the type `fuse.nydus-overlayfs`.
//!
//! The snapshotter hands Kata what it must know of an image in an option of an overlay mount, `extraoption`. A runtime without a
//! virtual machine mounts the same overlay through this helper, which leaves that option out. It is called with
//! `overlay TARGET -o OPTIONS`, by mount.fuse or directly.

use std::ffi::{CString, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use rustix::mount::MountFlags;

use super::BoxError;

/// The name that it is installed as; the runtime accepts names that begin so.
const NAME: &str = "nydus-overlayfs";

/// Options that are meant for the runtime and not for the kernel.
const NOT_FOR_THE_KERNEL: [&str; 2] = ["extraoption=", "io.katacontainers."];

/// Mounts an overlay.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Source of the mount, shown in lists of mounts.
    source: String,
    /// Where to mount it.
    target: PathBuf,
    /// lowerdir, upperdir, workdir and other options, separated by commas.
    #[arg(short, value_name = "OPTIONS", value_delimiter = ',')]
    o: Vec<String>,
    /// Type of the mount, as mount helpers are told; means nothing here.
    #[arg(short, value_name = "TYPE")]
    t: Option<String>,
}

/// A program that is called by the helper's name has the helper's command line.
pub(super) fn by_name(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments
        .first()
        .and_then(|program| Path::new(program).file_name());
    if name.is_some_and(|name| name.as_encoded_bytes().starts_with(NAME.as_bytes())) {
        arguments.insert(1, "mount-overlay".into());
    }
    arguments
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let (flags, data) = options(&arguments.o);
    let data = CString::new(data)?;
    rustix::mount::mount(
        arguments.source.as_str(),
        &arguments.target,
        "overlay",
        flags,
        Some(data.as_c_str()),
    )
    .map_err(|error| {
        format!(
            "cannot mount an overlay at {}: {error}; the kernel's log may say more",
            arguments.target.display()
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Flags, and what is left for the file system.
fn options(all: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in all.iter().map(String::as_str).filter(|option| !option.is_empty()) {
        match option {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" => flags -= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "suid" => flags -= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "dev" => flags -= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "exec" => flags -= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "async" | "atime" | "diratime" | "defaults" => {}
            option if NOT_FOR_THE_KERNEL.iter().any(|start| option.starts_with(start)) => {}
            option => data.push(option),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn what_is_meant_for_the_runtime_does_not_reach_the_kernel() {
        let given = "workdir=/w,upperdir=/u,lowerdir=/a:/b,ro,nosuid,dev,extraoption=eyJhIjoxfQ==,io.katacontainers.volume=e30=,index=off";
        let (flags, data) = options(&given.split(',').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(data, "workdir=/w,upperdir=/u,lowerdir=/a:/b,index=off");
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOSUID);
    }

    #[test]
    fn the_name_chooses_the_command() {
        use clap::Parser;
        for line in [
            "/usr/bin/nydus-overlayfs overlay /merged -o lowerdir=/a:/b,extraoption=x",
            "nydus-overlayfs-abc overlay /merged -o lowerdir=/a -o ro -t nydus-overlayfs",
            "rafs mount-overlay overlay /merged -o lowerdir=/a",
        ] {
            crate::tool::Arguments::try_parse_from(by_name(words(line))).unwrap();
        }
        assert_eq!(by_name(words("rafs check x")), words("rafs check x"));
    }
}
