//! A sandbox as Kata Containers makes it: one `rafsd`, one guest, one tag; `/containers` for what containers write and
//! `/rafs/<container>/lowerdir` for each image.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::guest::SHARED;
use crate::{Boot, Daemon, Guest, Image};

/// A container's names.
#[derive(Clone, Copy, Debug)]
pub struct Container {
    name: &'static str,
}

impl Container {
    /// A container of this name.
    #[must_use]
    pub const fn named(name: &'static str) -> Self {
        Self { name }
    }

    /// The mountpoint of its image, inside the tag.
    #[must_use]
    pub fn mountpoint(&self) -> String {
        format!("/rafs/{}/lowerdir", self.name)
    }

    /// Its root in the guest.
    #[must_use]
    pub fn root(&self) -> String {
        format!("{SHARED}/containers/{}/rootfs", self.name)
    }
}

/// A daemon, and a guest once it is booted.
pub struct Sandbox {
    daemon: Daemon,
    guest: Option<Guest>,
    /// The host's side of `/containers`.
    containers: PathBuf,
}

impl Sandbox {
    /// Starts the daemon and mounts `/containers`.
    pub fn prepare(rafsd: &Path, directory: &Path) -> Result<Self> {
        let containers = directory.join("containers");
        fs::create_dir_all(&containers)?;
        let daemon = Daemon::start(rafsd)?;
        daemon.mount_passthrough("/containers", &containers)?;
        Ok(Self {
            daemon,
            guest: None,
            containers,
        })
    }

    /// Mounts a container's image through the API and returns how long that took.
    pub fn mount_image(&self, container: &Container, image: &Image, config: &Value) -> Result<Duration> {
        let start = Instant::now();
        self.daemon
            .mount_image(&container.mountpoint(), &image.bootstrap, config)?;
        Ok(start.elapsed())
    }

    /// Boots the guest and mounts the device in it.
    pub fn boot(&mut self, boot: &Boot) -> Result<Duration> {
        let start = Instant::now();
        let mut guest = boot.clone().device(&self.daemon.socket()).start()?;
        let elapsed = start.elapsed();
        guest.mount_device()?;
        self.guest = Some(guest);
        Ok(elapsed)
    }

    /// The daemon.
    #[must_use]
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The guest; an error before [`Sandbox::boot`] and after it was taken.
    pub fn guest(&mut self) -> Result<&mut Guest> {
        self.guest.as_mut().context("the guest is not booted")
    }

    /// Takes the guest out, to end it in some way of the caller's.
    pub fn take_guest(&mut self) -> Result<Guest> {
        self.guest.take().context("the guest is not booted")
    }

    /// The directory of the host that holds what the container writes.
    #[must_use]
    pub fn layer(&self, container: &Container) -> PathBuf {
        self.containers.join(container.name).join("snapshotdir/fs")
    }

    /// Puts the container together on its mounted image and runs the command in it: its output and the time of both.
    pub fn run(&mut self, container: &Container, command: &str) -> Result<(String, Duration)> {
        let lower = format!("{SHARED}{}", container.mountpoint());
        self.run_on(&lower, container, command)
    }

    /// The directory of the host into which a container's image is unpacked.
    pub fn unpacked(&self, container: &Container) -> Result<PathBuf> {
        let directory = self.containers.join(container.name).join("lower");
        fs::create_dir_all(&directory)?;
        Ok(directory)
    }

    /// The same as [`Sandbox::run`] on the unpacked image.
    pub fn run_unpacked(&mut self, container: &Container, command: &str) -> Result<(String, Duration)> {
        let lower = format!("{SHARED}/containers/{}/lower", container.name);
        self.run_on(&lower, container, command)
    }

    fn run_on(&mut self, lower: &str, container: &Container, command: &str) -> Result<(String, Duration)> {
        let start = Instant::now();
        self.overlay(lower, container, "index=off")?;
        let root = container.root();
        let text = self
            .guest()?
            .check(&format!("chroot {root} /bin/sh -c {}", quoted(command)))?;
        Ok((text, start.elapsed()))
    }

    /// Puts the container together on its mounted image, with these options of the overlay.
    pub fn assemble(&mut self, container: &Container, options: &str) -> Result<()> {
        let lower = format!("{SHARED}{}", container.mountpoint());
        self.overlay(&lower, container, options)
    }

    fn overlay(&mut self, lower: &str, container: &Container, options: &str) -> Result<()> {
        for directory in ["snapshotdir/fs", "snapshotdir/work", "rootfs"] {
            fs::create_dir_all(self.containers.join(container.name).join(directory))?;
        }
        let layer = format!("{SHARED}/containers/{}/snapshotdir", container.name);
        let root = container.root();
        let options = format!("lowerdir={lower},upperdir={layer}/fs,workdir={layer}/work,{options}");
        self.guest()?
            .check(&format!("mount -t overlay overlay -o {options} {root}"))
            .map(drop)
    }

    /// Runs a script, up to its first failing command, in a container that was put together: its output.
    pub fn inside(&mut self, container: &Container, limit: Duration, script: &str) -> Result<String> {
        let root = container.root();
        let command = format!(
            "HOME=/root LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin exec chroot {root} /bin/sh -ec {}",
            quoted(script)
        );
        let done = self.guest()?.run_within(limit, &command)?;
        ensure!(
            done.status == 0,
            "in the container: {script}\nended with status {} and said:\n{}",
            done.status,
            done.text
        );
        Ok(done.text)
    }

    /// Creates, changes and deletes files in the container, and tells what the host then has in its writable layer.
    pub fn write_and_look(&mut self, container: &Container) -> Result<Vec<String>> {
        let root = container.root();
        self.guest()?.check(&format!(
            "chroot {root} /bin/sh -ec 'echo written in the guest >/root/note; echo changed >>/etc/issue; rm /etc/issue.net; sync'"
        ))?;
        let layer = self.layer(container);
        let note = fs::read_to_string(layer.join("root/note")).context("the new file on the host")?;
        ensure!(
            note == "written in the guest\n",
            "the new file holds {note:?} on the host"
        );
        let issue = fs::read_to_string(layer.join("etc/issue")).context("the changed file on the host")?;
        ensure!(
            issue.starts_with("Debian") && issue.ends_with("changed\n"),
            "the changed file holds {issue:?}"
        );
        let deleted = fs::symlink_metadata(layer.join("etc/issue.net"))
            .context("the deleted file's mark on the host")?;
        let whiteout = deleted.file_type().is_char_device() && deleted.rdev() == 0;
        ensure!(
            whiteout,
            "a deleted file of the image is not a whiteout on the host"
        );
        Ok(vec![
            format!("/root/note      {:?}, new", note.trim()),
            format!("/etc/issue      {} bytes, changed", issue.len()),
            "/etc/issue.net  character device 0:0, the mark of a deleted file".to_owned(),
        ])
    }

    /// Removes one container and its image while a program of the other keeps reading that one's image.
    pub fn remove_during_use(&mut self, gone: &Container, kept: &Container) -> Result<()> {
        let limit = Duration::from_secs(180);
        let (gone_root, kept_root) = (gone.root(), kept.root());
        let guest = self.guest()?;
        let program = guest.start(
            limit,
            &format!("cd {kept_root}; rounds=0; until [ -e /run/enough ]; do chroot . sha256sum /bin/busybox >/run/sum || exit 1; echo $((rounds += 1)) >/run/rounds; done; cat /run/sum"),
        )?;
        guest.check("until [ -s /run/rounds ]; do usleep 10000; done")?;
        guest.check(&format!("umount {gone_root}"))?;
        self.daemon.unmount(&gone.mountpoint())?;

        let guest = self.guest()?;
        let there = guest.run(&format!("ls {SHARED}{}/usr", gone.mountpoint()))?;
        ensure!(
            there.status != 0,
            "an image that was unmounted is still there:\n{}",
            there.text
        );
        if !guest.is_running(&program) {
            let ended = guest.finish(&program)?;
            bail!(
                "the program in the other container ended ({}): {}",
                ended.status,
                ended.text
            );
        }
        guest.check("before=$(cat /run/rounds); until [ $(cat /run/rounds) -gt $((before + 1)) ]; do usleep 10000; done; touch /run/enough")?;
        let done = guest.finish(&program)?;
        ensure!(
            done.status == 0,
            "the program in the other container failed: {}",
            done.text
        );
        Ok(())
    }

    /// Powers the guest off, ends the daemon and checks that it went well.
    pub fn end(mut self) -> Result<()> {
        if let Some(guest) = self.guest.take() {
            guest.power_off()?;
        }
        let (status, _) = self.terminate()?;
        ensure!(status.success(), "rafsd ended with {status}");
        Ok(())
    }

    /// Ends the daemon, whatever the guest does: its exit status and how long it took.
    pub fn terminate(self) -> Result<(ExitStatus, Duration)> {
        self.daemon.terminate()
    }
}

/// `text` as one word of a shell script.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}
