//! The vhost-user protocol: what a front-end asks for, done to rings and memory.
//!
//! The only module that knows the types of the `vhost` crate. One [`Backend`] per connection; the FUSE session and
//! the mounts outlive it. Rings are stopped in an order that leaves no guest memory touched afterwards: no more
//! pops, then whatever is active ends, then whatever is parked is answered (GET_VRING_BASE) or stays put until
//! the ring is enabled again (SET_VRING_ENABLE).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::DeviceOptions;
use super::memory::{DirtyLog, GuestMemory};
use super::queue::Queue;
use super::ring::Addresses;
use crate::fuse::dispatch::Server;

/// Requests of a ring that is being stopped may take so long to end by themselves.
const GRACE: Duration = Duration::from_millis(500);
/// What is left then is answered EIO, which takes no longer than so.
const LAST_GRACE: Duration = Duration::from_millis(200);
/// Memory regions at most, as the kernel's vhost has it.
const MEMORY_SLOTS: u64 = 509;

/// Virtio features that the device has.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::LOG_ALL.bits()
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Where the front-end has a region of guest memory, in its own address space.
struct Mapping {
    user: u64,
    size: u64,
    guest: u64,
}

/// One front-end's view of the device.
pub struct Backend {
    server: Arc<Server>,
    max_queue_size: u16,
    queues: Vec<Queue>,
    memory: Option<Arc<GuestMemory>>,
    mappings: Vec<Mapping>,
    log: Arc<DirtyLog>,
    features: u64,
    owned: bool,
}

impl Backend {
    /// A device that has just been connected to: all rings are stopped.
    pub fn start(server: Arc<Server>, options: &DeviceOptions) -> io::Result<Self> {
        let mut queues = Vec::new();
        for index in 0..=options.request_queues {
            queues.push(Queue::start(index, options, Arc::clone(&server))?);
        }
        Ok(Backend {
            server,
            max_queue_size: options.max_queue_size,
            queues,
            memory: None,
            mappings: Vec::new(),
            log: Arc::default(),
            features: 0,
            owned: false,
        })
    }

    /// The front-end is gone: nobody waits for answers any more.
    pub fn close(&mut self) {
        let queues = std::mem::take(&mut self.queues);
        for queue in &queues {
            queue.ring().set_enabled(false);
            queue.ring().set_started(false);
            queue.remove_kick();
            queue.stop();
        }
        let deadline = Instant::now() + GRACE;
        for queue in &queues {
            queue.ring().drain(false, deadline);
            self.server.deferred().abandon_all(queue.ring());
            queue.ring().set_memory(None);
        }
        self.server.release_locks();
        for queue in queues {
            queue.join(deadline);
        }
        self.memory = None;
        self.log.clear();
    }

    fn queue(&self, index: u32) -> Result<&Queue> {
        self.queues.get(index as usize).ok_or(Error::InvalidParam)
    }

    /// Stops a ring for good: what was popped is completed, one way or the other.
    fn stop(&self, queue: &Queue) {
        let ring = queue.ring();
        ring.set_stopping(true);
        ring.set_started(false);
        queue.remove_kick();
        self.server.deferred().fail_locks(ring);
        if !ring.drain(true, Instant::now() + GRACE) {
            let deadline = Instant::now() + LAST_GRACE;
            while Instant::now() < deadline {
                self.server.deferred().fail_all(ring);
                if ring.drain(true, Instant::now() + Duration::from_millis(10)) {
                    break;
                }
            }
        }
        ring.signal_used();
        ring.set_stopping(false);
        let left = ring.in_flight();
        if left > 0 {
            tracing::error!(
                queue = ring.index(),
                left,
                "requests are held up by the host and lost"
            );
        }
        ring.forget_in_flight();
    }

    fn guest_address(&self, user: u64) -> Result<u64> {
        let inside = |mapping: &&Mapping| user >= mapping.user && user - mapping.user < mapping.size;
        let mapping = self.mappings.iter().find(inside).ok_or(Error::InvalidParam)?;
        Ok(user - mapping.user + mapping.guest)
    }

    fn set_memory(&mut self, map: GuestMemoryMmap<()>) {
        let memory = Arc::new(GuestMemory::new(map, Arc::clone(&self.log)));
        for queue in &self.queues {
            queue.ring().set_memory(Some(Arc::clone(&memory)));
            queue.ring().wake();
        }
        self.memory = Some(memory);
    }

    fn has(&self, feature: VhostUserVirtioFeatures) -> bool {
        self.features & feature.bits() != 0
    }
}

fn handler_error(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn map_region(region: &VhostUserMemoryRegion, file: File) -> Result<(GuestRegionMmap<()>, Mapping)> {
    let mapping = Mapping {
        user: region.user_addr,
        size: region.memory_size,
        guest: region.guest_phys_addr,
    };
    let mapped = GuestRegionMmap::new(region.mmap_region(file)?, GuestAddress(region.guest_phys_addr));
    Ok((mapped.ok_or(Error::InvalidParam)?, mapping))
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("already claimed"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for queue in &self.queues {
            queue.ring().set_enabled(false);
            self.stop(queue);
            queue.ring().set_call(None);
        }
        self.features = 0;
        self.log.set_wanted(false);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        self.log.set_wanted(self.has(VhostUserVirtioFeatures::LOG_ALL));
        for queue in &self.queues {
            queue
                .ring()
                .set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            // Without SET_VRING_ENABLE rings are enabled from the start.
            if !self.has(VhostUserVirtioFeatures::PROTOCOL_FEATURES) {
                queue.ring().set_enabled(true);
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let (region, mapping) = map_region(region, file)?;
            mapped.push(region);
            mappings.push(mapping);
        }
        let map = GuestMemoryMmap::from_regions(mapped).map_err(handler_error)?;
        self.mappings = mappings;
        self.set_memory(map);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let queue = self.queue(index)?;
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= self.max_queue_size => {
                queue.ring().set_size(size);
                Ok(())
            }
            _ => Err(Error::InvalidParam),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let queue = self.queue(index)?;
        // The used ring is logged where it is written, so its log address is of no use.
        let addresses = Addresses {
            descriptors: self.guest_address(descriptors)?,
            available: self.guest_address(available)?,
            used: self.guest_address(used)?,
        };
        match queue.ring().set_addresses(addresses) {
            true => Ok(()),
            false => Err(Error::InvalidParam),
        }
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.queue(index)?.ring().set_base(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // There is no way to say no: the front-end waits for a number.
        let queue = self.queue(index).map_err(|_| Error::InvalidMessage)?;
        self.stop(queue);
        queue.ring().set_call(None);
        Ok(VhostUserVringState::new(index, u32::from(queue.ring().base())))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let queue = self.queue(u32::from(index))?;
        queue
            .set_kick(file.map(OwnedFd::from))
            .map_err(Error::ReqHandlerError)?;
        queue.ring().set_started(true);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(u32::from(index))?
            .ring()
            .set_call(file.map(OwnedFd::from));
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(u32::from(index))?
            .ring()
            .set_error(file.map(OwnedFd::from));
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // The library remembers them and refuses what was not negotiated.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.queue(index)?;
        queue.ring().set_enabled(enable);
        if enable {
            self.server.deferred().resume(queue.ring());
        } else if !queue.ring().drain(false, Instant::now() + GRACE) {
            tracing::error!(
                queue = index,
                "a request still runs on a ring that has been disabled"
            );
        }
        Ok(())
    }

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("there is no configuration space"))
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("there is no configuration space"))
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("in-flight requests are not recorded"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("in-flight requests are not recorded"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let (region, mapping) = map_region(region, file)?;
        let map = match &self.memory {
            Some(memory) => memory
                .map()
                .insert_region(Arc::new(region))
                .map_err(handler_error)?,
            None => GuestMemoryMmap::from_regions(vec![region]).map_err(handler_error)?,
        };
        self.mappings.push(mapping);
        self.set_memory(map);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.as_ref().ok_or(Error::InvalidParam)?;
        let start = GuestAddress(region.guest_phys_addr);
        let (map, _) = memory
            .map()
            .remove_region(start, region.memory_size)
            .map_err(handler_error)?;
        self.mappings
            .retain(|mapping| mapping.guest != region.guest_phys_addr);
        self.set_memory(map);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation(
            "the device's state cannot be transferred",
        ))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation(
            "the device's state cannot be transferred",
        ))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.log
            .set_map(OwnedFd::from(file), log.mmap_offset, log.mmap_size)
            .map_err(Error::ReqHandlerError)
    }
}
