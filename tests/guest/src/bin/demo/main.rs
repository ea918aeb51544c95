//! `make demo`: a guest runs a program from a lazily loaded image, against downloading the image first.
//!
//! Three sandboxes, each a `rafsd` and a guest of its own, as a container runtime starts them, run the same Python
//! command from the same Debian tree: lazily with nothing cached, after "download and unpack everything", and lazily
//! with a warm cache and no registry. The first sandbox also shows what a container's life brings: files written,
//! a second image mounted while the guest runs, the first taken away while the second is in use.

mod packed;
mod table;

use std::env;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rafsd_guest::cache::scratch;
use rafsd_guest::image::{busybox_tree, python_tree};
use rafsd_guest::registry::Traffic;
use rafsd_guest::{Boot, Cache, Container, Image, Registry, Sandbox, config};

use packed::Packed;
use table::Row;

/// The registry answers every request this late.
const LATENCY: Duration = Duration::from_millis(10);

/// What the container runs.
const COMMAND: &str =
    "python3 -c 'import json, ssl; print(json.dumps({\"hello from\": ssl.OPENSSL_VERSION}))'";

fn main() -> ExitCode {
    match Demo::prepare().and_then(|demo| demo.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Demo {
    start: Instant,
    rafsd: PathBuf,
    rafs: PathBuf,
    boot: Boot,
    python: Image,
    busybox: Image,
    packed: Packed,
    /// Where the registry finds what it serves.
    store: PathBuf,
    directory: tempfile::TempDir,
}

impl Demo {
    fn prepare() -> Result<Self> {
        let start = Instant::now();
        ensure!(
            rustix::process::geteuid().is_root(),
            "this needs root (device nodes of a Debian tree, a container's writable layer): sudo make demo"
        );
        let own = env::current_exe()?;
        let programs = own.parent().context("no directory of this program")?;
        let (rafsd, rafs) = (programs.join("rafsd"), programs.join("rafs"));

        say(
            start,
            "Preparing a guest kernel, a RAM disk, a Debian tree with Python (kept under target/guest)",
        );
        let cache = Cache::open()?;
        let boot = Boot::new(&cache)?;
        let (python_tree, busybox_tree) = (python_tree(&cache)?, busybox_tree(&cache)?);

        let directory = scratch(&cache)?;
        let store = directory.path().join("store");
        say(
            start,
            "Building two images: Debian with Python, and a single static program (busybox)",
        );
        let python = Image::build(&rafs, &python_tree, &store.join("python"))?;
        let busybox = Image::build(&rafs, &busybox_tree, &store.join("busybox"))?;
        say(
            start,
            "Packing the Debian tree as a tar.zst layer too, for the comparison",
        );
        let packed = Packed::build(&python_tree, &store)?;
        Ok(Self {
            start,
            rafsd,
            rafs,
            boot,
            python,
            busybox,
            packed,
            store,
            directory,
        })
    }

    fn run(&self) -> Result<()> {
        let registry = Registry::start(&self.rafs, &self.store, LATENCY)?;
        self.say(&format!(
            "Serving both from http://{} with {} ms latency",
            registry.address(),
            LATENCY.as_millis()
        ));

        let cache = self.directory.path().join("cache");
        let cold = self
            .lazily_cold(&registry, &cache)
            .context("lazily, with an empty cache")?;
        let unpacked = self
            .download_first(&registry)
            .context("download and unpack first")?;
        let address = registry.address();
        registry.stop()?;
        // In its place somebody who counts who knocks, and answers nobody.
        let knocks = TcpListener::bind(address)?;
        let warm = self
            .lazily_warm(&knocks, &cache)
            .context("lazily, with a warm cache and no registry")?;

        println!("\n{COMMAND}\n\n{}", table::render(&[cold, warm, unpacked]));
        Ok(())
    }

    /// The first sandbox, with all that happens in it.
    fn lazily_cold(&self, registry: &Registry, cache: &Path) -> Result<Row> {
        self.say("Cold: a sandbox with an empty cache");
        let mut sandbox = Sandbox::prepare(&self.rafsd, &self.directory.path().join("cold"))?;
        let config = config::of_registry(registry.address(), cache);
        let before = registry.traffic()?;
        let python = Container::named("python");
        let mounting = sandbox.mount_image(&python, &self.python, &config)?;
        self.boot(&mut sandbox)?;
        let (text, running) = sandbox.run(&python, COMMAND)?;
        let traffic = registry.traffic()? - before;
        self.say(&format!("The container says: {}", text.trim()));
        ensure!(
            traffic.requests > 0,
            "an empty cache was filled without a request"
        );

        self.say("Writing in the container; on the host its writable layer then has:");
        for line in sandbox.write_and_look(&python)? {
            println!("           {line}");
        }

        self.say("Mounting the second image while the guest runs");
        let busybox = Container::named("busybox");
        sandbox.mount_image(&busybox, &self.busybox, &config)?;
        let (text, _) = sandbox.run(
            &busybox,
            ". /etc/os-release; echo \"$NAME with $(ls /bin | wc -l) programs\"",
        )?;
        self.say(&format!("The second container says: {}", text.trim()));

        self.say("Taking the first image away while the second is in use");
        sandbox.remove_during_use(&python, &busybox)?;
        sandbox.end()?;
        Ok(Row {
            title: "lazily, nothing cached",
            ready: mounting,
            running,
            traffic,
            size: self.python.size()?,
        })
    }

    /// What an engine without lazy loading does, over the same registry, for the same guest.
    fn download_first(&self, registry: &Registry) -> Result<Row> {
        self.say("For comparison: download and unpack everything, then run");
        let mut sandbox = Sandbox::prepare(&self.rafsd, &self.directory.path().join("unpacked"))?;
        self.boot(&mut sandbox)?;
        let python = Container::named("python");
        let before = registry.traffic()?;
        let start = Instant::now();
        self.packed.unpack(registry, &sandbox.unpacked(&python)?)?;
        let unpacking = start.elapsed();
        let traffic = registry.traffic()? - before;
        let (text, running) = sandbox.run_unpacked(&python, COMMAND)?;
        self.say(&format!("The container says: {}", text.trim()));
        sandbox.end()?;
        Ok(Row {
            title: "download and unpack first",
            ready: unpacking,
            running,
            traffic,
            size: self.packed.size()?,
        })
    }

    fn lazily_warm(&self, knocks: &TcpListener, cache: &Path) -> Result<Row> {
        self.say("Warm: the registry is stopped; a new sandbox with the cache of the first");
        let mut sandbox = Sandbox::prepare(&self.rafsd, &self.directory.path().join("warm"))?;
        let python = Container::named("python");
        let config = config::of_registry(knocks.local_addr()?, cache);
        let mounting = sandbox.mount_image(&python, &self.python, &config)?;
        self.boot(&mut sandbox)?;
        let (text, running) = sandbox.run(&python, COMMAND)?;
        self.say(&format!("The container says: {}", text.trim()));
        sandbox.end()?;

        knocks.set_nonblocking(true)?;
        let requests = std::iter::from_fn(|| knocks.accept().ok()).count();
        ensure!(
            requests == 0,
            "{requests} connection attempts to the registry, with everything cached"
        );
        Ok(Row {
            title: "lazily, warm cache, no registry",
            ready: mounting,
            running,
            traffic: Traffic::default(),
            size: self.python.size()?,
        })
    }

    fn boot(&self, sandbox: &mut Sandbox) -> Result<()> {
        let time = sandbox.boot(&self.boot)?;
        self.say(&format!(
            "The guest has booted ({:.1} s, emulated) and mounted the device",
            time.as_secs_f64()
        ));
        Ok(())
    }

    fn say(&self, text: &str) {
        say(self.start, text);
    }
}

fn say(start: Instant, text: &str) {
    println!("[{:6.1} s] {text}", start.elapsed().as_secs_f64());
}
