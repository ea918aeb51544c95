//! The life of a connection, as QEMU and Cloud Hypervisor lead it.
//!
//! Both orders were recorded from the real programs. What differs: QEMU enables the rings before it hands
//! out the final call descriptors, and replaces those while queues run; Cloud Hypervisor asks for an
//! acknowledgement of every message, pauses by disabling rings, and after a lost connection sets the
//! protocol features without asking for them again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::memory::{DirtyLog, GuestMemory, Place, Region};
use crate::message::{Connection, NO_FD, Request, feature, protocol, vring_state, words};
use crate::vring::{Event, Queue};
use crate::{Error, Result};

/// Whose messages to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// QEMU 7.2 and later.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
}

/// Where a ring starts again when the connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// At the index of the next chain to be made available: what was in flight is lost.
    Available,
    /// At the index of the last chain returned: what was in flight is served again.
    Used,
}

/// What the machine looks like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose messages to send.
    pub order: Order,
    /// Request queues, besides the high priority queue.
    pub request_queues: usize,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// Accept EVENT_IDX if it is offered.
    pub event_idx: bool,
    /// Accept INDIRECT_DESC if it is offered, and put longer chains into tables.
    pub indirect: bool,
    /// Guest memory.
    pub regions: Vec<Place>,
    /// Protocol features never to accept.
    pub refuse_protocol: u64,
    /// Time limit of every answer, on the socket and on the queues.
    pub timeout: Duration,
    /// Insist on a used length that equals the length of the reply.
    pub strict_length: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            order: Order::CloudHypervisor,
            request_queues: 1,
            queue_size: 128,
            event_idx: true,
            indirect: true,
            regions: vec![
                Place {
                    address: 0,
                    size: 32 << 20,
                },
                Place {
                    address: 32 << 20,
                    size: 16 << 20,
                },
                Place {
                    address: 1 << 32,
                    size: 16 << 20,
                },
            ],
            refuse_protocol: 0,
            timeout: Duration::from_secs(60),
            strict_length: true,
        }
    }
}

/// The VMM: a connection, and what was agreed on it.
pub struct Vmm {
    /// The connection; for messages out of turn.
    pub connection: Connection,
    path: PathBuf,
    order: Order,
    timeout: Duration,
    /// Virtio features that the device offered.
    pub offered: u64,
    /// Virtio features in force.
    pub features: u64,
    /// Protocol features in force.
    pub protocol: u64,
    /// Queues that the device has; 0 if it was not asked.
    pub queue_limit: u64,
    log: Option<DirtyLog>,
}

impl Vmm {
    /// Connects and agrees on features.
    pub fn connect(path: &Path, options: &Options) -> Result<Self> {
        let connection = Connection::open(path, options.timeout)?;
        let mut vmm = Self {
            connection,
            path: path.to_owned(),
            order: options.order,
            timeout: options.timeout,
            offered: 0,
            features: 0,
            protocol: 0,
            queue_limit: 0,
            log: None,
        };
        vmm.handshake(options)?;
        Ok(vmm)
    }

    fn handshake(&mut self, options: &Options) -> Result<()> {
        let known = protocol::MQ
            | protocol::LOG_SHMFD
            | protocol::REPLY_ACK
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::DEVICE_STATE
            | if self.order == Order::Qemu {
                protocol::RESET_DEVICE
            } else {
                0
            };
        if self.order == Order::CloudHypervisor {
            self.connection.send(Request::SetOwner, &[], &[])?;
        }
        self.offered = self.connection.ask(Request::GetFeatures, &[], &[])?.value()?;
        if self.offered & feature::PROTOCOL_FEATURES != 0 {
            let offered = self
                .connection
                .ask(Request::GetProtocolFeatures, &[], &[])?
                .value()?;
            self.protocol = offered & known & !options.refuse_protocol;
            self.connection
                .send(Request::SetProtocolFeatures, &words(&[self.protocol]), &[])?;
            self.connection.reply_ack =
                self.protocol & protocol::REPLY_ACK != 0 && self.order == Order::CloudHypervisor;
        }
        if self.protocol & protocol::MQ != 0 {
            self.queue_limit = self.connection.ask(Request::GetQueueNum, &[], &[])?.value()?;
            if self.queue_limit < 1 + options.request_queues as u64 {
                return Err(Error::Usage(format!(
                    "the device has {} queues, {} are wanted",
                    self.queue_limit,
                    1 + options.request_queues
                )));
            }
        }
        let mut wanted = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        wanted |= if options.event_idx { feature::EVENT_IDX } else { 0 };
        wanted |= if options.indirect {
            feature::INDIRECT_DESC
        } else {
            0
        };
        self.features = self.offered & wanted;
        if self.order == Order::Qemu {
            self.connection.send(Request::SetOwner, &[], &[])?;
            self.offered = self.connection.ask(Request::GetFeatures, &[], &[])?.value()?;
        }
        Ok(())
    }

    /// Connects again to the same path, without asking for the protocol features again.
    pub fn reconnect(&mut self) -> Result<()> {
        self.connection = Connection::open(&self.path, self.timeout)?;
        self.connection.send(Request::SetOwner, &[], &[])?;
        self.offered = self.connection.ask(Request::GetFeatures, &[], &[])?.value()?;
        if self.features & !self.offered != 0 {
            return Err(Error::Device(format!(
                "features {:#x} are no longer offered",
                self.features
            )));
        }
        self.connection
            .send(Request::SetProtocolFeatures, &words(&[self.protocol]), &[])?;
        self.connection.reply_ack =
            self.protocol & protocol::REPLY_ACK != 0 && self.order == Order::CloudHypervisor;
        Ok(())
    }

    /// Whether `bit` is in force.
    pub fn has_protocol(&self, bit: u64) -> bool {
        self.protocol & bit != 0
    }

    /// Starts all queues at `bases`, in the order of the chosen VMM.
    pub fn activate(&mut self, memory: &GuestMemory, queues: &mut [&mut Queue], bases: &[u16]) -> Result<()> {
        for queue in queues.iter_mut() {
            queue.renew_events()?;
        }
        match self.order {
            Order::Qemu => self.activate_qemu(memory, queues, bases),
            Order::CloudHypervisor => self.activate_cloud_hypervisor(memory, queues, bases),
        }?;
        // What was made available before the ring ran has no kick of its own.
        for (queue, base) in queues.iter_mut().zip(bases) {
            if queue.available_index() != *base {
                queue.force_kick();
            }
        }
        Ok(())
    }

    fn activate_qemu(&mut self, memory: &GuestMemory, queues: &[&mut Queue], bases: &[u16]) -> Result<()> {
        let connection = &self.connection;
        // Until the guest has unmasked its interrupts, QEMU catches calls itself.
        let masked = queues.iter().map(|_| Event::new()).collect::<Result<Vec<_>>>()?;
        for (queue, event) in queues.iter().zip(&masked) {
            connection.send(
                Request::SetVringCall,
                &words(&[queue.index as u64]),
                &[event.as_fd()],
            )?;
        }
        connection.send(
            Request::SetFeatures,
            &words(&[self.features | self.log_bit()]),
            &[],
        )?;
        self.send_memory(memory)?;
        for (queue, base) in queues.iter().zip(bases) {
            let index = queue.index;
            connection.send(
                Request::SetVringNum,
                &vring_state(index, u32::from(queue.shape.size)),
                &[],
            )?;
            connection.send(Request::SetVringBase, &vring_state(index, u32::from(*base)), &[])?;
            connection.send(Request::SetVringAddr, &self.ring_addresses(queue), &[])?;
            connection.send(
                Request::SetVringKick,
                &words(&[index as u64]),
                &[queue.kick.as_fd()],
            )?;
        }
        for queue in queues {
            connection.send(Request::SetVringEnable, &vring_state(queue.index, 1), &[])?;
        }
        for (queue, event) in queues.iter().zip(&masked) {
            let index = queue.index as u64;
            connection.send(Request::SetVringCall, &words(&[index]), &[queue.call.as_fd()])?;
            // A message with an answer, so that the device is known to be past the exchange.
            connection.ask(Request::GetFeatures, &[], &[])?;
            if event.take() > 0 {
                queue.call.signal();
            }
        }
        Ok(())
    }

    fn activate_cloud_hypervisor(
        &mut self,
        memory: &GuestMemory,
        queues: &[&mut Queue],
        bases: &[u16],
    ) -> Result<()> {
        let connection = &self.connection;
        connection.send_acked(
            Request::SetFeatures,
            &words(&[self.features | self.log_bit()]),
            &[],
        )?;
        self.send_memory_table(memory)?;
        for queue in queues {
            let size = vring_state(queue.index, u32::from(queue.shape.size));
            connection.send_acked(Request::SetVringNum, &size, &[])?;
        }
        for (queue, base) in queues.iter().zip(bases) {
            let index = queue.index;
            connection.send_acked(Request::SetVringAddr, &self.ring_addresses(queue), &[])?;
            connection.send_acked(Request::SetVringBase, &vring_state(index, u32::from(*base)), &[])?;
            connection.send_acked(
                Request::SetVringCall,
                &words(&[index as u64]),
                &[queue.call.as_fd()],
            )?;
            connection.send_acked(
                Request::SetVringKick,
                &words(&[index as u64]),
                &[queue.kick.as_fd()],
            )?;
        }
        for queue in queues {
            connection.send_acked(Request::SetVringEnable, &vring_state(queue.index, 1), &[])?;
        }
        Ok(())
    }

    fn ring_addresses(&self, queue: &Queue) -> Vec<u8> {
        let logged = u32::from(self.log.is_some());
        let mut payload = vring_state(queue.index, logged);
        payload.extend(words(&[
            queue.descriptors.user_address(),
            queue.used.user_address(),
            queue.available.user_address(),
            queue.used.address,
        ]));
        payload
    }

    /// QEMU adds region by region where that is negotiated.
    fn send_memory(&self, memory: &GuestMemory) -> Result<()> {
        if !self.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            return self.send_memory_table(memory);
        }
        let regions = memory.regions();
        let slots = self.connection.ask(Request::GetMaxMemSlots, &[], &[])?.value()?;
        if slots < regions.len() as u64 {
            return Err(Error::Device(format!(
                "{slots} memory slots, {} needed",
                regions.len()
            )));
        }
        for region in &regions {
            self.add_region(region)?;
        }
        Ok(())
    }

    fn send_memory_table(&self, memory: &GuestMemory) -> Result<()> {
        let regions = memory.regions();
        let mut payload = words(&[regions.len() as u64]);
        for region in &regions {
            payload.extend(region_words(region));
        }
        let files: Vec<_> = regions.iter().map(|region| region.file.as_fd()).collect();
        self.send_memory_message(Request::SetMemTable, &payload, &files)
    }

    /// Both VMMs ask for the acknowledgement of memory messages where they can; QEMU of no others.
    fn send_memory_message(&self, request: Request, payload: &[u8], files: &[BorrowedFd<'_>]) -> Result<()> {
        if self.has_protocol(protocol::REPLY_ACK) {
            self.connection.send_confirmed(request, payload, files)
        } else {
            self.connection.send(request, payload, files)
        }
    }

    /// Adds a region while queues run: by slot, or with the whole table.
    pub fn add_memory(&self, memory: &GuestMemory, region: &Region) -> Result<()> {
        if self.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            self.add_region(region)
        } else {
            self.send_memory_table(memory)
        }
    }

    fn add_region(&self, region: &Region) -> Result<()> {
        let payload = [words(&[0]), region_words(region)].concat();
        self.send_memory_message(Request::AddMemReg, &payload, &[region.file.as_fd()])
    }

    /// Removes a region while queues run.
    pub fn remove_memory(&self, memory: &GuestMemory, region: &Region) -> Result<()> {
        if !self.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            return self.send_memory_table(memory);
        }
        let payload = [words(&[0]), region_words(region)].concat();
        self.send_memory_message(Request::RemMemReg, &payload, &[])
    }

    /// Disables and stops all queues. The answer has the index at which each may be started again.
    pub fn stop(&self, queues: &[&mut Queue]) -> Result<Vec<u16>> {
        self.enable(queues, false)?;
        let mut bases = Vec::new();
        for queue in queues {
            bases.push(self.stop_queue(queue.index)?);
        }
        if self.order == Order::Qemu {
            for queue in queues {
                let none = words(&[queue.index as u64 | NO_FD]);
                self.connection.send(Request::SetVringCall, &none, &[])?;
            }
        }
        Ok(bases)
    }

    /// Takes the memory back region by region, as QEMU does before a start with another layout.
    pub fn forget_memory(&self, memory: &GuestMemory) -> Result<()> {
        if self.order == Order::Qemu && self.has_protocol(protocol::CONFIGURE_MEM_SLOTS) {
            for region in &memory.regions() {
                self.remove_memory(memory, region)?;
            }
        }
        Ok(())
    }

    /// GET_VRING_BASE of one queue.
    pub fn stop_queue(&self, index: usize) -> Result<u16> {
        let answer = self
            .connection
            .ask(Request::GetVringBase, &vring_state(index, 0), &[])?;
        match answer.payload.as_slice() {
            &[a, b, c, d, low, high, 0, 0] if u32::from_le_bytes([a, b, c, d]) as usize == index => {
                Ok(u16::from_le_bytes([low, high]))
            }
            other => Err(Error::Device(format!("base of queue {index}: {other:?}"))),
        }
    }

    /// Pauses or resumes the queues.
    pub fn enable(&self, queues: &[&mut Queue], enabled: bool) -> Result<()> {
        for queue in queues {
            let state = vring_state(queue.index, u32::from(enabled));
            self.connection.send_acked(Request::SetVringEnable, &state, &[])?;
        }
        self.settle()
    }

    /// Comes back when the device has handled all messages so far.
    pub fn settle(&self) -> Result<()> {
        self.connection.ask(Request::GetFeatures, &[], &[]).map(|_| ())
    }

    /// RESET_DEVICE.
    pub fn reset_device(&self) -> Result<()> {
        self.connection.send_acked(Request::ResetDevice, &[], &[])?;
        self.settle()
    }

    /// Gives a running queue another call event.
    pub fn replace_call(&self, queue: &mut Queue) -> Result<()> {
        let old = std::mem::replace(&mut queue.call, Event::new()?);
        let index = words(&[queue.index as u64]);
        self.connection
            .send_acked(Request::SetVringCall, &index, &[queue.call.as_fd()])?;
        self.settle()?;
        queue.counts.calls += old.take();
        Ok(())
    }

    fn log_bit(&self) -> u64 {
        if self.log.is_some() { feature::LOG_ALL } else { 0 }
    }

    /// Starts to log dirty pages, or goes on in a fresh log. The answer is the log before, which the
    /// device must not write to any more.
    pub fn log(&mut self, memory: &GuestMemory, queues: &[&mut Queue]) -> Result<Option<DirtyLog>> {
        let log = DirtyLog::new(memory)?;
        let payload = words(&[log.size, 0]);
        self.connection
            .ask(Request::SetLogBase, &payload, &[log.file.as_fd()])?;
        let before = self.log.replace(log);
        if before.is_none() {
            self.set_logging(queues)?;
        }
        Ok(before)
    }

    /// Ends logging.
    pub fn stop_log(&mut self, queues: &[&mut Queue]) -> Result<Option<DirtyLog>> {
        let log = self.log.take();
        self.set_logging(queues)?;
        Ok(log)
    }

    fn set_logging(&self, queues: &[&mut Queue]) -> Result<()> {
        let features = words(&[self.features | self.log_bit()]);
        self.connection.send_acked(Request::SetFeatures, &features, &[])?;
        for queue in queues {
            self.connection
                .send_acked(Request::SetVringAddr, &self.ring_addresses(queue), &[])?;
        }
        self.settle()
    }

    /// Pages that the log has marked since the last time.
    pub fn dirty_pages(&self) -> Vec<u64> {
        self.log.as_ref().map(DirtyLog::take).unwrap_or_default()
    }

    /// SET_DEVICE_STATE_FD: `load` says in which direction the state goes. The answer is the descriptor
    /// to use in place of `file`, if the device sent one.
    pub fn device_state(&self, load: bool, file: &OwnedFd) -> Result<Option<OwnedFd>> {
        let payload = [u32::from(load).to_le_bytes(), 0u32.to_le_bytes()].concat();
        let mut answer = self
            .connection
            .ask(Request::SetDeviceStateFd, &payload, &[file.as_fd()])?;
        match answer.value()? {
            code if code & 0xff != 0 => Err(Error::Refused {
                request: "SetDeviceStateFd".into(),
                code,
            }),
            _ => Ok(answer.files.pop()),
        }
    }

    /// CHECK_DEVICE_STATE.
    pub fn check_device_state(&self) -> Result<()> {
        match self
            .connection
            .ask(Request::CheckDeviceState, &[], &[])?
            .value()?
        {
            0 => Ok(()),
            code => Err(Error::Refused {
                request: "CheckDeviceState".into(),
                code,
            }),
        }
    }
}

fn region_words(region: &Region) -> Vec<u8> {
    let place = region.place;
    words(&[
        place.address,
        place.size,
        region.mapping.address(),
        region.file_offset,
    ])
}

/// Memory and queues of a machine.
pub(crate) fn build(options: &Options, features: u64) -> Result<(Arc<GuestMemory>, Vec<Queue>)> {
    let memory = Arc::new(GuestMemory::new(&options.regions)?);
    let shape = crate::vring::Shape {
        size: options.queue_size,
        event_idx: features & feature::EVENT_IDX != 0,
    };
    let queues = (0..=options.request_queues)
        .map(|index| Queue::new(&memory, index, shape))
        .collect::<Result<Vec<_>>>()?;
    Ok((memory, queues))
}
