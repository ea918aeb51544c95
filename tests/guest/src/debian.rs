//! Packages and trees from the Debian mirror that this machine is configured to use.
//!
//! Downloads go through `apt-get` with lists and caches of their own under `target/guest/apt-*`, so they need no root,
//! never change the machine, and do not depend on how old the machine's own package lists are.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::cache::{Cache, entries, name_ends_with, remove};

/// A Debian suite on a mirror, e.g. `bookworm` or `bookworm-backports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suite {
    /// URI of the mirror, as apt's sources name it.
    pub mirror: String,
    /// Name of the suite.
    pub name: String,
}

impl Suite {
    /// The suite that this machine runs, on the mirror it is installed from.
    pub fn of_this_machine() -> Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
        let name = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .map(|name| name.trim_matches('"').to_owned())
            .context("/etc/os-release has no VERSION_CODENAME: this needs a Debian machine")?;
        let targets = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ]))?;
        let mirror = targets
            .lines()
            .find_map(|line| match line.split(' ').collect::<Vec<_>>().as_slice() {
                [mirror, suite, "main"] if *suite == name => Some((*mirror).to_owned()),
                _ => None,
            })
            .with_context(|| format!("apt knows no mirror for the suite {name} (main)"))?;
        Ok(Self { mirror, name })
    }

    /// The suite of newer packages rebuilt for this one.
    #[must_use]
    pub fn backports(&self) -> Self {
        Self {
            mirror: self.mirror.clone(),
            name: format!("{}-backports", self.name),
        }
    }
}

/// A private view of one suite: lists, caches, downloads.
pub struct Apt {
    options: Vec<String>,
    downloads: PathBuf,
}

impl Apt {
    /// Fetches the package lists of `suite`.
    pub fn update(cache: &Cache, suite: &Suite) -> Result<Self> {
        let state = cache.directory().join(format!("apt-{}", suite.name));
        let downloads = state.join("downloads");
        for directory in ["lists/partial", "archives/partial", "downloads"] {
            fs::create_dir_all(state.join(directory))?;
        }
        let sources = state.join("sources.list");
        let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        let signed_by = if keyring.exists() {
            format!("[signed-by={}] ", keyring.display())
        } else {
            String::new()
        };
        fs::write(
            &sources,
            format!("deb {signed_by}{} {} main\n", suite.mirror, suite.name),
        )?;
        let set = |name: &str, value: &dyn std::fmt::Display| format!("-o{name}={value}");
        let options = vec![
            set("Dir::Etc::sourcelist", &sources.display()),
            set("Dir::Etc::sourceparts", &"/dev/null"),
            set("Dir::Etc::preferences", &"/dev/null"),
            set("Dir::Etc::preferencesparts", &"/dev/null"),
            set("Dir::State::lists", &state.join("lists").display()),
            set("Dir::Cache", &state.display()),
            set("Dir::Cache::archives", &state.join("archives").display()),
            // The lists are ours; without this apt as root would change to a user who may not read them.
            set("APT::Sandbox::User", &"root"),
            set("Acquire::Retries", &3),
        ];
        let apt = Self { options, downloads };
        output(apt.command("apt-get").args(["-q", "update", "--error-on=any"]))
            .with_context(|| format!("fetch the package lists of {} from {}", suite.name, suite.mirror))?;
        Ok(apt)
    }

    /// Downloads the packages and unpacks them below `into`.
    pub fn unpack(&self, packages: &[&str], into: &Path) -> Result<()> {
        fs::create_dir_all(into)?;
        for package in packages {
            let directory = self.downloads.join(package);
            remove(&directory)?;
            fs::create_dir_all(&directory)?;
            output(
                self.command("apt-get")
                    .args(["-q", "download", package])
                    .current_dir(&directory),
            )?;
            let archives = entries(&directory)?;
            let archive = archives
                .iter()
                .find(|path| name_ends_with(path, ".deb"))
                .with_context(|| format!("apt-get download {package} left no .deb file"))?;
            output(Command::new("dpkg-deb").arg("-x").arg(archive).arg(into))?;
            remove(&directory)?;
        }
        Ok(())
    }

    /// The packages that `package` depends on directly.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let text = output(self.command("apt-cache").args(["depends", package]))?;
        Ok(text
            .lines()
            .filter_map(|line| Some(line.trim().strip_prefix("Depends: ")?.to_owned()))
            .collect())
    }

    /// Downloads what `apt-get install` of the packages would download in the system `tree`.
    fn download_for(&self, tree: &Path, packages: &[&str], into: &Path) -> Result<()> {
        fs::create_dir_all(into.join("partial"))?;
        let set = |name: &str, path: &Path| format!("-o{name}={}", path.display());
        let mut command = self.command("apt-get");
        command
            .arg(set("Dir::State::status", &tree.join("var/lib/dpkg/status")))
            .arg(set("Dir::Cache::archives", into))
            .args([
                "-q",
                "--yes",
                "--no-install-recommends",
                "--download-only",
                "install",
            ])
            .args(packages);
        output(&mut command)?;
        remove(&into.join("partial"))?;
        remove(&into.join("lock"))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// A repository without a network: the packages, those that they need and `tree` does not have, and their index.
/// In apt's words, `deb [trusted=yes] copy:DIRECTORY ./`.
pub fn repository(cache: &Cache, name: &str, tree: &Path, packages: &[&str]) -> Result<PathBuf> {
    cache.entry(name, |into| {
        Apt::update(cache, &Suite::of_this_machine()?)?.download_for(tree, packages, into)?;
        let mut index = String::new();
        for path in entries(into)?.iter().filter(|path| name_ends_with(path, ".deb")) {
            let fields = output(Command::new("dpkg-deb").arg("--field").arg(path))?;
            let content = fs::read(path)?;
            // Without the escapes that apt puts into names, which it would undo when it asks for the file.
            let file = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .replace('%', "-");
            fs::rename(path, into.join(&file))?;
            index.push_str(&format!(
                "{}\nFilename: ./{file}\nSize: {}\nSHA256: {}\n\n",
                fields.trim_end(),
                content.len(),
                hex::encode(Sha256::digest(&content)),
            ));
        }
        fs::write(into.join("Packages"), index).context("write the index of packages")
    })
}

/// A Debian system with `packages`, as a container image has it: the path of its root directory.
///
/// Needs root (device nodes, chroot). Files of the package manager that differ from run to run are left out.
pub fn tree(cache: &Cache, name: &str, packages: &[&str]) -> Result<PathBuf> {
    let suite = Suite::of_this_machine()?;
    cache.entry(name, |root| {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a Debian tree can only be made by root (device nodes, chroot)"
        );
        let downloads = cache.directory().join("debootstrap");
        fs::create_dir_all(&downloads)?;
        let mut command = Command::new("debootstrap");
        command
            .arg("--variant=minbase")
            .arg(format!("--cache-dir={}", downloads.display()));
        if !packages.is_empty() {
            command.arg(format!("--include={}", packages.join(",")));
        }
        if let Some(proxy) = proxy() {
            command.env("http_proxy", proxy);
        }
        output(command.arg(&suite.name).arg(root).arg(&suite.mirror))?;
        for leftover in [
            "var/cache/apt",
            "var/lib/apt/lists",
            "var/log",
            "var/cache/ldconfig",
            "debootstrap",
        ] {
            let path = root.join(leftover);
            remove(&path)?;
            if leftover != "debootstrap" {
                fs::create_dir(&path)?;
            }
        }
        Ok(())
    })
}

/// A copy of the Debian system `tree` with further packages, unpacked only: their programs can be used, their scripts
/// have not run. Much faster than a [`tree`] of its own. Needs root.
pub fn with_programs(cache: &Cache, name: &str, tree: &Path, packages: &[&str]) -> Result<PathBuf> {
    cache.entry(name, |root| {
        let archives = cache.directory().join(format!("{name}.archives"));
        remove(&archives)?;
        Apt::update(cache, &Suite::of_this_machine()?)?.download_for(tree, packages, &archives)?;
        output(
            Command::new("cp")
                .args(["-a", "--reflink=auto"])
                .arg(tree)
                .arg(root),
        )?;
        let mut dpkg = Command::new("dpkg");
        dpkg.arg(format!("--root={}", root.display()))
            .args(["--force-depends", "--unpack"])
            .args(entries(&archives)?);
        output(&mut dpkg)?;
        remove(&archives)
    })
}

/// The proxy that apt uses for http, if any.
fn proxy() -> Option<String> {
    let text = output(Command::new("apt-config").args(["shell", "P", "Acquire::http::Proxy"])).ok()?;
    let proxy = text.trim().strip_prefix("P='")?.strip_suffix('\'')?;
    (!proxy.is_empty() && proxy != "DIRECT").then(|| proxy.to_owned())
}

/// Runs a program of the machine to its end and returns what it wrote to its standard output.
///
/// The error names the program and its arguments and holds the end of what it printed.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let line = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ");
    command
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive");
    let done = command.stdin(Stdio::null()).output().with_context(|| {
        format!("run {name}: is its Debian package installed? (`make packages` installs all that is needed)")
    })?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    if !done.status.success() {
        let errors = String::from_utf8_lossy(&done.stderr);
        let lines: Vec<&str> = text.lines().chain(errors.lines()).collect();
        let end = lines
            .get(lines.len().saturating_sub(15)..)
            .unwrap_or_default()
            .join("\n");
        bail!("`{line}` failed ({}):\n{end}", done.status);
    }
    Ok(text)
}
