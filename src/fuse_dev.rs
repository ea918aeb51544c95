//! FUSE mode: the same mounts over `/dev/fuse`, for hosts without a virtual machine.
//!
//! The kernel's requests travel to the device over virtqueues of this process's own making: a driver like that of a guest, in shared
//! memory, whose front-end is here. So the dispatcher, parked reads, drain and counters are those that guests have, byte for byte. The
//! price is a hop between threads for each request.
//!
//! * [`FuseMount`]: makes the mount, connects the driver. * `lane`: one queue with the threads that feed and empty it.

mod lane;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::error::Error;
use crate::fuse::init::MAX_WRITE;
use crate::sandbox::{Role, Sandbox};
use lane::{LANE, Lane, QUEUE};

/// Where the shared memory begins for the device; never 0, which means nothing.
const BASE: u64 = 1 << 32;

/// Lanes at most.
pub const MAX_LANES: u16 = 8;

/// A socket for the device that nobody but us can connect to.
pub struct PrivateSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl PrivateSocket {
    /// Makes it, in a directory of its own that is removed when this is dropped.
    ///
    /// # Errors
    ///
    /// The directory for temporary files cannot be written.
    pub fn new() -> Result<Self, Error> {
        let failed = |error: io::Error| Error::Start(format!("private socket: {error}"));
        let name = format!("rafsd-{}-{:x}", std::process::id(), random());
        let directory = std::env::temp_dir().join(name);
        rustix::fs::mkdir(&directory, Mode::RWXU).map_err(|error| failed(error.into()))?;
        let path = directory.join("device");
        let listener = UnixListener::bind(&path).map_err(failed)?;
        Ok(Self { listener, path })
    }

    /// What the device listens on.
    ///
    /// # Errors
    ///
    /// No descriptor is left.
    pub fn listener(&self) -> Result<UnixListener, Error> {
        self.listener
            .try_clone()
            .map_err(|error| Error::Start(format!("private socket: {error}")))
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Some(directory) = self.path.parent() {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

fn random() -> u64 {
    use std::hash::BuildHasher;
    std::hash::RandomState::new().hash_one(0)
}

/// A mount of `/dev/fuse`. Dropping it unmounts.
pub struct FuseMount {
    mountpoint: PathBuf,
    lanes: Vec<Lane>,
    unmounter: Unmounter,
    _frontend: Frontend,
}

impl FuseMount {
    /// Mounts what the device behind `socket` serves at `mountpoint`, with `lanes` queues.
    ///
    /// # Errors
    ///
    /// `/dev/fuse` is missing, the kernel refuses the mount, or the device the driver.
    pub fn start(
        mountpoint: &Path,
        socket: &PrivateSocket,
        lanes: u16,
        sandbox: &Sandbox,
    ) -> Result<Self, Error> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Error::Start(format!("FUSE mount at {}: {what}: {error}", mountpoint.display()))
        };
        let lanes = lanes.clamp(1, MAX_LANES);
        let memory = Memory::new(lanes).map_err(|error| failed("memory", &error))?;
        let stream = UnixStream::connect(&socket.path).map_err(|error| failed("device", &error))?;
        let (frontend, queues) = connect(stream, &memory, lanes).map_err(|error| failed("device", &error))?;
        let device = open_device().map_err(|error| failed("/dev/fuse", &error))?;
        let mountpoint = std::path::absolute(mountpoint).map_err(|error| failed("path", &error))?;
        let unmounter =
            Unmounter::start(mountpoint.clone(), sandbox).map_err(|error| failed("threads", &error))?;
        mount(&mountpoint, &device).map_err(|error| failed("mount", &error))?;
        // From here on dropping unmounts.
        let mut mount = Self {
            mountpoint: mountpoint.clone(),
            lanes: Vec::new(),
            unmounter,
            _frontend: frontend,
        };
        for (number, events) in queues.into_iter().enumerate() {
            let base = lane_base(number as u16);
            let lane = Lane::start(
                Arc::clone(&device),
                Arc::clone(&memory.guest),
                base,
                events,
                sandbox,
            );
            mount.lanes.push(lane.map_err(|error| failed("threads", &error))?);
        }
        tracing::info!("mounted over FUSE at {}", mountpoint.display());
        Ok(mount)
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if let Err(error) = self.unmounter.unmount() {
            tracing::warn!("unmount {}: {error}", self.mountpoint.display());
        }
        for lane in &self.lanes {
            lane.stop();
        }
    }
}

/// A thread that unmounts when it is told to: no other thread may.
struct Unmounter {
    go: Sender<()>,
    thread: Option<JoinHandle<rustix::io::Result<()>>>,
}

impl Unmounter {
    fn start(mountpoint: PathBuf, sandbox: &Sandbox) -> io::Result<Self> {
        let (go, told) = bounded::<()>(1);
        let sandbox = sandbox.clone();
        let thread = std::thread::Builder::new()
            .name("unmount".into())
            .spawn(move || {
                sandbox.enter(Role::Unmount);
                match told.recv() {
                    Ok(()) => rustix::mount::unmount(&mountpoint, UnmountFlags::DETACH),
                    // It was never mounted.
                    Err(_) => Ok(()),
                }
            })?;
        Ok(Self {
            go,
            thread: Some(thread),
        })
    }

    fn unmount(&mut self) -> io::Result<()> {
        let gone = || io::Error::other("the thread that unmounts is gone");
        self.go.send(()).map_err(|_| gone())?;
        let thread = self.thread.take().ok_or_else(gone)?;
        thread.join().map_err(|_| gone())?.map_err(io::Error::from)
    }
}

struct Memory {
    file: OwnedFd,
    guest: Arc<GuestMemoryMmap>,
    size: u64,
}

impl Memory {
    fn new(lanes: u16) -> io::Result<Self> {
        let size = LANE * u64::from(lanes);
        let file = rustix::fs::memfd_create("fuse-queues", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, size)?;
        let mapped = FileOffset::new(File::from(file.try_clone()?), 0);
        let guest =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(BASE), size as usize, Some(mapped))])
                .map_err(io::Error::other)?;
        Ok(Self {
            file,
            guest: Arc::new(guest),
            size,
        })
    }
}

fn lane_base(number: u16) -> u64 {
    BASE + LANE * u64::from(number)
}

/// Sets the device up as a machine monitor and its guest would.
fn connect(
    stream: UnixStream,
    memory: &Memory,
    lanes: u16,
) -> Result<(Frontend, Vec<lane::Events>), vhost::Error> {
    let mut frontend = Frontend::from_stream(stream, u64::from(lanes) + 1);
    let wanted = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | (1 << VIRTIO_F_VERSION_1);
    frontend.set_owner()?;
    let features = frontend.get_features()? & wanted;
    frontend.set_features(features)?;
    let protocol = frontend.get_protocol_features()? & VhostUserProtocolFeatures::MQ;
    frontend.set_protocol_features(protocol)?;
    frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: BASE,
        memory_size: memory.size,
        // The device knows our addresses by this table only.
        userspace_addr: BASE,
        mmap_offset: 0,
        mmap_handle: memory.file.as_raw_fd(),
    }])?;
    let mut queues = Vec::new();
    for number in 0..lanes {
        // Queue 0 is for what has to overtake; the kernel has one line for all.
        let (index, base) = (usize::from(number) + 1, lane_base(number));
        let events = lane::Events::new().map_err(vhost::Error::IOError)?;
        frontend.set_vring_num(index, QUEUE)?;
        frontend.set_vring_base(index, 0)?;
        frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: QUEUE,
                queue_size: QUEUE,
                flags: 0,
                desc_table_addr: base,
                avail_ring_addr: base + lane::AVAILABLE,
                used_ring_addr: base + lane::USED,
                log_addr: None,
            },
        )?;
        frontend.set_vring_call(index, &events.call)?;
        frontend.set_vring_kick(index, &events.kick)?;
        frontend.set_vring_enable(index, true)?;
        queues.push(events);
    }
    Ok((frontend, queues))
}

fn open_device() -> io::Result<Arc<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(Arc::new(rustix::fs::open("/dev/fuse", flags, Mode::empty())?))
}

fn mount(mountpoint: &Path, device: &OwnedFd) -> io::Result<()> {
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={MAX_WRITE}",
        device.as_raw_fd()
    );
    let data = CString::new(data)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("rafsd", mountpoint, "fuse.rafsd", flags, Some(data.as_c_str()))?;
    Ok(())
}
