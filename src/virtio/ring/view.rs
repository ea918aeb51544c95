//! The parts of a ring in guest memory (VIRTIO 1.3, 2.7.5 to 2.7.8).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::virtio::chain::DESCRIPTOR;
use crate::virtio::memory::{GuestMemory, Unmapped, Window};

/// Where the parts of a ring are, as guest physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// The parts of a ring, found in guest memory.
pub(super) struct View {
    pub(super) descriptors: Window,
    available: Window,
    used: Window,
    pub(super) size: u16,
}

impl View {
    pub(super) fn new(memory: &Arc<GuestMemory>, addresses: Addresses, size: u16) -> Result<Self, Unmapped> {
        let entries = usize::from(size);
        let window = |address, length, align| Window::new(Arc::clone(memory), address, length, align);
        Ok(View {
            descriptors: window(addresses.descriptors, entries * DESCRIPTOR, 16)?,
            available: window(addresses.available, 6 + entries * 2, 2)?,
            used: window(addresses.used, 6 + entries * 8, 4)?,
            size,
        })
    }

    pub(super) fn available_index(&self) -> u16 {
        self.available.load_u16(2, Ordering::Acquire)
    }

    pub(super) fn available_flags(&self) -> u16 {
        self.available.load_u16(0, Ordering::Relaxed)
    }

    pub(super) fn head(&self, position: u16) -> u16 {
        self.available
            .load_u16(4 + usize::from(position % self.size) * 2, Ordering::Relaxed)
    }

    /// The used index after which the driver wants to be told.
    pub(super) fn used_event(&self) -> u16 {
        self.available
            .load_u16(4 + usize::from(self.size) * 2, Ordering::Relaxed)
    }

    /// The available index after which the device wants to be told.
    pub(super) fn set_available_event(&self, index: u16) {
        self.used
            .store_u16(4 + usize::from(self.size) * 8, index, Ordering::Relaxed);
    }

    pub(super) fn used_index(&self) -> u16 {
        self.used.load_u16(2, Ordering::Relaxed)
    }

    pub(super) fn set_used_flags(&self, flags: u16) {
        self.used.store_u16(0, flags, Ordering::Relaxed);
    }

    pub(super) fn add_used(&self, position: u16, head: u16, length: u32) {
        let mut element = [0; 8];
        let (id, written) = element.split_at_mut(4);
        id.copy_from_slice(&u32::from(head).to_le_bytes());
        written.copy_from_slice(&length.to_le_bytes());
        self.used
            .store(4 + usize::from(position % self.size) * 8, &element);
        self.used
            .store_u16(2, position.wrapping_add(1), Ordering::Release);
    }
}
