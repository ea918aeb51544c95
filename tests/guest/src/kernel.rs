//! The kernel that a guest boots, and its modules, from Debian's cloud kernel package.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::{Cache, entries, name_ends_with};
use crate::debian::{Apt, Suite, output};

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    root: PathBuf,
    release: String,
}

impl Kernel {
    /// The kernel of the Debian release that this machine runs.
    pub fn of_this_release(cache: &Cache) -> Result<Self> {
        Self::of(cache, &Suite::of_this_machine()?)
    }

    /// The kernel from this release's backports: newer, where the release has any.
    pub fn of_backports(cache: &Cache) -> Result<Self> {
        Self::of(cache, &Suite::of_this_machine()?.backports())
    }

    fn of(cache: &Cache, suite: &Suite) -> Result<Self> {
        let root = cache.entry(&format!("kernel-{}", suite.name), |into| {
            let apt = Apt::update(cache, suite)?;
            let package = apt
                .dependencies("linux-image-cloud-amd64")?
                .into_iter()
                .find(|name| name.starts_with("linux-image-"))
                .context("linux-image-cloud-amd64 depends on no linux-image package")?;
            apt.unpack(&[&package], into)
        })?;
        let release = fs::read_dir(root.join("boot"))?
            .filter_map(Result::ok)
            .find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
            .with_context(|| format!("no vmlinuz in {}", root.join("boot").display()))?;
        Ok(Self { root, release })
    }

    /// The kernel's release, e.g. `6.1.0-50-cloud-amd64`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Major and minor version, e.g. (6, 1).
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        let mut parts = self.release.split('.').map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    }

    /// The bootable image.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// All modules of this kernel, by name.
    pub fn modules(&self) -> Result<Modules> {
        let directory = ["usr/lib/modules", "lib/modules"]
            .iter()
            .map(|base| self.root.join(base).join(&self.release).join("kernel"))
            .find(|directory| directory.exists())
            .with_context(|| format!("no modules below {}", self.root.display()))?;
        let mut files = HashMap::new();
        collect(&directory, &mut files)?;
        Ok(Modules { files })
    }
}

/// The module files of a kernel.
pub struct Modules {
    files: HashMap<String, PathBuf>,
}

/// One module, unpacked.
#[derive(Clone)]
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// The ELF file's bytes.
    pub bytes: Vec<u8>,
}

impl Modules {
    /// The module `name` and all it needs, in the order in which they must be loaded.
    ///
    /// A module that has no file is taken to be built into the kernel.
    pub fn closure(&self, name: &str) -> Result<Vec<Module>> {
        let mut loaded = Vec::new();
        self.visit(name, &mut loaded)?;
        Ok(loaded)
    }

    fn visit(&self, name: &str, loaded: &mut Vec<Module>) -> Result<()> {
        let name = name.replace('-', "_");
        let Some(path) = self.files.get(&name) else {
            return Ok(());
        };
        if loaded.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let bytes = read(path)?;
        for needed in dependencies(&bytes) {
            self.visit(&needed, loaded)?;
        }
        loaded.push(Module { name, bytes });
        Ok(())
    }
}

fn collect(directory: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for path in entries(directory)? {
        if path.is_dir() {
            collect(&path, files)?;
        } else if let Some((name, _)) = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.split_once(".ko"))
        {
            files.insert(name.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

/// Newer Debian kernels carry compressed modules; the guest's `insmod` takes plain ones.
fn read(path: &Path) -> Result<Vec<u8>> {
    let packed = ["xz", "zst"]
        .iter()
        .zip(["xz", "zstd"])
        .find(|(end, _)| name_ends_with(path, &format!(".ko.{end}")));
    let Some((_, program)) = packed else {
        return fs::read(path).with_context(|| format!("read {}", path.display()));
    };
    let plain = tempfile::NamedTempFile::new()?;
    output(
        std::process::Command::new("sh")
            .args(["-c", "exec \"$0\" -dc \"$1\" >\"$2\"", program])
            .arg(path)
            .arg(plain.path()),
    )?;
    Ok(fs::read(plain.path())?)
}

/// The names in the `depends=` line of a module's information section (strings that end with NUL).
fn dependencies(module: &[u8]) -> Vec<String> {
    module
        .split(|&byte| byte == 0)
        .find_map(|text| text.strip_prefix(b"depends="))
        .map(|names| {
            String::from_utf8_lossy(names)
                .split(',')
                .filter(|n| !n.is_empty())
                .map(str::to_owned)
                .collect()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_the_information_section() {
        assert_eq!(
            dependencies(b"\0license=GPL\0depends=fuse,virtio\0name=x\0"),
            ["fuse", "virtio"]
        );
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"no such line").is_empty());
    }
}
