//! A Debian userland at work in a container: a lazily loaded image below, a directory of the host above, a real guest's
//! overlay between them. Packages come and go, programs that are hard on file systems run, and what the overlay asks of
//! either side is checked on the host.
//!
//! `make test-guest-full` runs this, on the kernel of this release and on the one of its backports.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::kernel::Kernel;
use rafsd_guest::{Boot, Cache, Container, Image, Registry, Sandbox, config, debian};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

/// For one step. The longest, apt-get, takes two minutes on a free machine.
const LIMIT: Duration = Duration::from_secs(900);

/// In the image.
const INSTALLED: [&str; 3] = ["python3", "git", "libcap2-bin"];

/// Installed in the container: scripts that make a group, give a program capabilities and another a group's rights.
const TO_INSTALL: [&str; 3] = ["cron", "iputils-ping", "jq"];

const APT: &str = "
export DEBIAN_FRONTEND=noninteractive
echo 'deb [trusted=yes] copy:/mnt/packages ./' >/etc/apt/sources.list
apt-get -q update
apt-get -q install --yes --no-install-recommends cron iputils-ping jq
echo '[1, 2]' | jq -c 'map(. + 1)'
getcap /bin/ping
stat -c '%a %G' /usr/bin/crontab
";

const PYTHON: &str = r#"
python3 -m venv --without-pip /root/venv
/root/venv/bin/python - <<'END'
import json, mmap, multiprocessing, os, shutil, sqlite3, ssl, tempfile

# A data base that two processes write, with its shared memory in a file.
base = sqlite3.connect("/root/base", timeout=120)
assert base.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
base.execute("CREATE TABLE lines (writer INTEGER, number INTEGER)")
base.commit()

def write(writer):
    mine = sqlite3.connect("/root/base", timeout=120)
    for number in range(20):
        with mine:
            mine.execute("INSERT INTO lines VALUES (?, ?)", (writer, number))

with multiprocessing.Pool(2) as pool:
    pool.map(write, range(2))
assert base.execute("SELECT count(*) FROM lines").fetchone() == (40,)
assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)

# A mapped file that is changed through the map, the file, and a second name.
with open("/root/mapped", "w+b") as file:
    file.truncate(1 << 20)
    with mmap.mmap(file.fileno(), 0) as memory:
        memory[4096:4100] = b"here"
        memory.flush()
    os.link("/root/mapped", "/root/second")
    file.seek(4096)
    assert file.read(4) == b"here"
assert open("/root/second", "rb").read()[4096:4100] == b"here"

# Whole trees of the image, copied, compared by content, removed.
source = os.path.dirname(json.__file__)
copy = tempfile.mkdtemp(dir="/var/tmp")
shutil.copytree(source, copy + "/json")
assert sorted(os.listdir(source)) == sorted(os.listdir(copy + "/json"))
shutil.rmtree(copy)

with tempfile.TemporaryFile(dir="/root") as file:
    file.write(b"x" * 100000)
    file.flush()
    assert os.fstat(file.fileno()).st_nlink == 0

os.replace("/root/second", "/etc/issue.net")
print("python", ssl.OPENSSL_VERSION.split()[0], os.stat("/etc/issue.net").st_nlink)
END
python3 -m compileall -q -f /usr/lib/python3/dist-packages
"#;

const GIT: &str = r#"
git config --global user.name nobody
git config --global user.email nobody@example.org
git config --global init.defaultBranch main
cp -a /usr/lib/python3.*/email /root/work
cd /root/work
git init -q
git add -A
git commit -q -m first
git mv parser.py reader.py
git switch -q -c other
rm -r mime
git commit -q -a -m second
git switch -q main
git clone -q --local /root/work /root/local
git clone -q file:///root/work /root/clone
cd /root/clone
git switch -q other
git fsck --strict
git gc -q
git fsck --strict
git status --porcelain
git -C /root/work switch -q other
diff -r --exclude=.git /root/work /root/clone
git -C /root/local log --oneline | wc -l
git log --oneline | wc -l
"#;

/// Files and directories of the image get new owners and capabilities, and lose the latter with the next change.
const OWNERS: &str = r#"
chown -R 1000:1001 /usr/share/git-core
find /usr/share/git-core ! -user 1000 -o ! -group 1001
getcap /usr/bin/yes
setcap cap_net_raw,cap_chown=ep /usr/bin/yes
getcap /usr/bin/yes
chown 1000 /usr/bin/yes
getcap /usr/bin/yes
cp /usr/bin/true /root/true
setcap cap_net_raw=ep /root/true
ln /root/true /root/true-too
getcap /root/true-too
echo >>/root/true
getcap /root/true-too
chmod 6755 /usr/bin/seq
setpriv --reuid=1000 --regid=1000 --clear-groups sh -c ': >>/usr/bin/seq' 2>/dev/null || echo refused
stat -c '%a %u' /usr/bin/seq
chown 1000 /usr/bin/seq
stat -c '%a %u' /usr/bin/seq
"#;

const OWNERS_SAID: &str = "/usr/bin/yes cap_chown,cap_net_raw=ep
/root/true-too cap_net_raw=ep
refused
6755 0
755 1000
";

/// Directories of the image are removed and made again, renamed, filled from each other; files get second names.
const NAMES: &str = r#"
before=$(ls /usr/share/zoneinfo/America | wc -l)
[ $before -gt 5 ]
rm -r /usr/share/zoneinfo/America
mkdir /usr/share/zoneinfo/America
ls -A /usr/share/zoneinfo/America
echo new >/usr/share/zoneinfo/America/new
sum() { (cd $1; find . -type f -exec sha256sum {} + | sort -k 2); }
sum /usr/share/doc >/root/before
mv /usr/share/doc /usr/share/papers
mkdir /usr/share/doc
mv /usr/share/papers/git /usr/share/doc/git
sum /usr/share/doc/git >/dev/null
mv /usr/share/doc/git /usr/share/papers/git
rmdir /usr/share/doc
mv /usr/share/papers /usr/share/doc
sum /usr/share/doc | cmp - /root/before
ln /usr/bin/env /root/one
ln /root/one /root/two
stat -c %h /usr/bin/env
[ /usr/bin/env -ef /root/two ]
rm /root/two
stat -c %h /root/one
cp /usr/bin/env /root/new
mv /root/new /usr/bin/env
/usr/bin/env true
stat -c %h /usr/bin/env
"#;

/// An image, where it is served and how it is mounted.
struct Prepared {
    cache: Cache,
    image: Image,
    _registry: Registry,
    config: serde_json::Value,
    directory: tempfile::TempDir,
}

fn prepare() -> Prepared {
    let cache = Cache::open().unwrap();
    let tree = debian::tree(&cache, "tree-userland", &INSTALLED).unwrap();
    let packages = debian::repository(&cache, "packages-userland", &tree, &TO_INSTALL).unwrap();
    let directory = scratch(&cache).unwrap();
    let store = directory.path().join("store");
    let image = Image::build(Path::new(RAFS), &tree, &store).unwrap();
    let registry = Registry::start(Path::new(RAFS), &store, Duration::ZERO).unwrap();
    let config = config::of_registry(registry.address(), &directory.path().join("cache"));
    // A volume of the host's, beside the containers.
    let volume = directory.path().join("containers/packages");
    fs::create_dir_all(&volume).unwrap();
    for file in fs::read_dir(packages).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), volume.join(file.file_name())).unwrap();
    }
    Prepared {
        cache,
        image,
        _registry: registry,
        config,
        directory,
    }
}

/// Puts the container together with what programs expect of a system.
fn assemble(sandbox: &mut Sandbox, container: &Container, options: &str) {
    sandbox.assemble(container, options).unwrap();
    let root = container.root();
    sandbox
        .guest()
        .unwrap()
        .check(&format!(
            "mount -t proc proc {root}/proc; mount -o rbind /dev {root}/dev
             mkdir -p {root}/mnt/packages; mount -o bind {SHARED}/containers/packages {root}/mnt/packages"
        ))
        .unwrap();
}

/// Takes it apart, and lets the guest forget what it knows.
fn take_apart(sandbox: &mut Sandbox, container: &Container) {
    let root = container.root();
    sandbox
        .guest()
        .unwrap()
        .check(&format!(
            "sync; umount {root}/mnt/packages; umount {root}/proc; umount -l {root}/dev; umount {root}
             echo 3 >/proc/sys/vm/drop_caches"
        ))
        .unwrap();
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_char_device() && found.rdev() == 0)
}

fn attribute(path: &Path, name: &str) -> Vec<u8> {
    let mut value = [0; 256];
    let length = rustix::fs::getxattr(path, name, &mut value).unwrap();
    value[..length].to_vec()
}

fn boot(prepared: &Prepared, kernel: impl FnOnce(&Cache) -> Kernel) -> Sandbox {
    let kernel = kernel(&prepared.cache);
    println!("guest: {}", kernel.release());
    let boot = Boot::with_kernel(&prepared.cache, kernel).unwrap();
    let mut sandbox = Sandbox::prepare(Path::new(RAFSD), prepared.directory.path()).unwrap();
    sandbox.boot(&boot).unwrap();
    sandbox
}

fn a_userland_works(kernel: impl FnOnce(&Cache) -> Kernel) {
    let prepared = prepare();
    let mut sandbox = boot(&prepared, kernel);
    let container = Container::named("userland");
    sandbox
        .mount_image(&container, &prepared.image, &prepared.config)
        .unwrap();
    assemble(&mut sandbox, &container, "index=off");
    let mut step = |name: &str, container: &Container, script: &str| {
        let begun = Instant::now();
        let text = sandbox.inside(container, LIMIT, script).unwrap();
        println!("{name}: {:.1} s", begun.elapsed().as_secs_f64());
        text
    };
    let text = step("apt-get install", &container, APT);
    assert!(
        text.ends_with("\n[2,3]\n/bin/ping cap_net_raw=ep\n2755 crontab\n"),
        "{text}"
    );
    assert_eq!(step("dpkg --audit", &container, "dpkg --audit"), "");
    assert_eq!(step("dpkg --verify", &container, "dpkg --verify"), "");
    assert_eq!(step("python", &container, PYTHON), "python OpenSSL 2\n");
    assert_eq!(step("git", &container, GIT), "1\n2\n");
    assert_eq!(step("owners, capabilities", &container, OWNERS), OWNERS_SAID);
    assert_eq!(step("names", &container, NAMES), "3\n2\n1\n");
    step(
        "apt-get purge",
        &container,
        "DEBIAN_FRONTEND=noninteractive apt-get -q purge --yes git cron jq; ! git --version 2>/dev/null",
    );

    // On the host: what was removed from the image is hidden, what was made again is opaque.
    let layer = sandbox.layer(&container);
    assert!(is_whiteout(&layer.join("usr/bin/git")));
    assert!(!layer.join("usr/bin/jq").exists());
    assert_eq!(
        attribute(
            &layer.join("usr/share/zoneinfo/America"),
            "trusted.overlay.opaque"
        ),
        b"y"
    );
    assert_eq!(
        attribute(&layer.join("usr/bin/ping"), "security.capability").len(),
        20
    );

    // The same container again, by a guest that knows nothing of it any more.
    take_apart(&mut sandbox, &container);
    assemble(&mut sandbox, &container, "index=off");
    let again = "dpkg --audit; getcap /bin/ping; ls /usr/share/zoneinfo/America; python3 -c 'print(6 * 7)'";
    assert_eq!(
        sandbox.inside(&container, LIMIT, again).unwrap(),
        "/bin/ping cap_net_raw=ep\nnew\n42\n"
    );
    take_apart(&mut sandbox, &container);
    end(sandbox);
}

/// Nothing was wrong with the guest's kernel, and all ends as it should.
fn end(mut sandbox: Sandbox) {
    let guest = sandbox.guest().unwrap();
    let complaints = guest.complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
    let traces = guest
        .run("dmesg | grep -E 'WARNING|BUG:|Oops|Call Trace'")
        .unwrap();
    assert_eq!((traces.status, traces.text.as_str()), (1, ""));
    sandbox.end().unwrap();
}

/// With options of the overlay that keep content below: renamed directories, changed owners.
fn directories_are_renamed_in_place(kernel: impl FnOnce(&Cache) -> Kernel) {
    let prepared = prepare();
    let mut sandbox = boot(&prepared, kernel);
    let options = "index=off,redirect_dir=on,metacopy=on";
    let container = Container::named("redirected");
    sandbox
        .mount_image(&container, &prepared.image, &prepared.config)
        .unwrap();
    assemble(&mut sandbox, &container, options);
    let begun = Instant::now();
    let same = sandbox.inside(&container, LIMIT, NAMES).unwrap();
    assert_eq!(same, "3\n2\n1\n");
    let text = sandbox
        .inside(
            &container,
            LIMIT,
            "cd /usr/share; find git-core -type f -exec sha256sum {} + | sort >/root/sums
             mv git-core moved; mkdir git-core; mv moved git-core/deeper
             chown -R 1000:1000 git-core/deeper
             cp -a git-core/deeper/templates /root; mv git-core/deeper git-core-again
             rmdir git-core; mv git-core-again git-core
             sha256sum --quiet -c /root/sums && stat -c %u git-core/templates/description",
        )
        .unwrap();
    assert_eq!(text, "1000\n");
    println!("renamed in place: {:.1} s", begun.elapsed().as_secs_f64());
    let layer = sandbox.layer(&container);
    // The directory came back to its name; on the way it became one that says where its content is.
    assert_eq!(
        attribute(&layer.join("usr/share/git-core"), "trusted.overlay.redirect"),
        b"/usr/share/git-core"
    );
    let described = layer.join("usr/share/git-core/templates/description");
    assert!(
        rustix::fs::getxattr(&described, "trusted.overlay.metacopy", &mut [0_u8; 64][..]).is_ok(),
        "a change of owner copied the content"
    );
    assert!(fs::read(&described).unwrap().iter().all(|byte| *byte == 0));
    take_apart(&mut sandbox, &container);
    assemble(&mut sandbox, &container, options);
    let text = sandbox
        .inside(&container, LIMIT, "cd /usr/share; sha256sum --quiet -c /root/sums; ls -A zoneinfo/America; git --version | cut -c 1-3")
        .unwrap();
    assert_eq!(text, "new\ngit\n");
    take_apart(&mut sandbox, &container);
    end(sandbox);
}

#[test]
#[ignore = "long: run by make test-guest-full"]
fn a_debian_userland_works_in_a_container() {
    a_userland_works(|cache| Kernel::of_this_release(cache).unwrap());
}

#[test]
#[ignore = "long: run by make test-guest-full"]
fn a_debian_userland_works_in_a_container_with_a_newer_kernel() {
    a_userland_works(|cache| Kernel::of_backports(cache).unwrap());
}

#[test]
#[ignore = "long: run by make test-guest-full"]
fn directories_of_an_image_are_renamed() {
    directories_are_renamed_in_place(|cache| Kernel::of_this_release(cache).unwrap());
}

#[test]
#[ignore = "long: run by make test-guest-full"]
fn directories_of_an_image_are_renamed_with_a_newer_kernel() {
    directories_are_renamed_in_place(|cache| Kernel::of_backports(cache).unwrap());
}
