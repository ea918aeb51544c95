//! vhost-user messages on the wire, with file descriptors and a time limit on every answer.
//!
//! Written out here rather than taken from the `vhost` crate: the device is built on that crate, and it
//! keeps a front-end from sending what real VMMs send (protocol features set without being asked for
//! again after a reconnect) and what hostile ones send (wrong sizes, wrong descriptors).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::{Error, Result};

/// Requests of the front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // The names are those of the specification.
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

/// Virtio feature bits.
pub mod feature {
    /// The device marks the pages that it changes.
    pub const LOG_ALL: u64 = 1 << 26;
    /// A descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are asked for by ring index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user protocol features exist.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0 and later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Chains complete in the order they were made available.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// vhost-user protocol feature bits.
pub mod protocol {
    /// GET_QUEUE_NUM.
    pub const MQ: u64 = 1 << 0;
    /// SET_LOG_BASE with a descriptor.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// Any message may ask for an acknowledgement.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The device may send requests on a socket of its own.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The device has a configuration space.
    pub const CONFIG: u64 = 1 << 9;
    /// GET_INFLIGHT_FD and SET_INFLIGHT_FD.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// Value of SET_VRING_KICK, CALL and ERR that says that no descriptor comes with it.
pub const NO_FD: u64 = 1 << 8;

/// An answer: payload and descriptors.
#[derive(Debug)]
pub struct Answer {
    /// The payload.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub files: Vec<OwnedFd>,
}

impl Answer {
    /// The payload as one u64.
    pub fn value(&self) -> Result<u64> {
        match self.payload.as_slice().try_into() {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => Err(Error::Device(format!(
                "answer of {} bytes, 8 expected",
                self.payload.len()
            ))),
        }
    }
}

/// A connection to the device.
pub struct Connection {
    stream: UnixStream,
    timeout: Duration,
    /// REPLY_ACK was negotiated.
    pub reply_ack: bool,
}

impl Connection {
    /// Connects to the socket at `path`. Answers are waited for at most `timeout`.
    pub fn open(path: &Path, timeout: Duration) -> Result<Self> {
        let stream =
            UnixStream::connect(path).map_err(|e| Error::io(format!("connect {}", path.display()), e))?;
        Self::over(stream, timeout)
    }

    /// Uses a socket that is connected already.
    pub fn over(stream: UnixStream, timeout: Duration) -> Result<Self> {
        stream
            .set_read_timeout(Some(timeout))
            .map_err(|e| Error::io("set a time limit", e))?;
        Ok(Self {
            stream,
            timeout,
            reply_ack: false,
        })
    }

    /// Sends a message without waiting for anything.
    pub fn send(&self, request: Request, payload: &[u8], files: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_raw(request as u32, VERSION, payload.len() as u32, payload, files)
    }

    /// Sends a message and waits for its acknowledgement, if that was negotiated.
    pub fn send_acked(&self, request: Request, payload: &[u8], files: &[BorrowedFd<'_>]) -> Result<()> {
        if self.reply_ack {
            self.send_confirmed(request, payload, files)
        } else {
            self.send(request, payload, files)
        }
    }

    /// Sends a message and waits for its acknowledgement.
    pub fn send_confirmed(&self, request: Request, payload: &[u8], files: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_raw(
            request as u32,
            VERSION | NEED_REPLY,
            payload.len() as u32,
            payload,
            files,
        )?;
        match self.receive(request)?.value()? {
            0 => Ok(()),
            code => Err(Error::Refused {
                request: format!("{request:?}"),
                code,
            }),
        }
    }

    /// Sends a message that has an answer of its own, and waits for it.
    pub fn ask(&self, request: Request, payload: &[u8], files: &[BorrowedFd<'_>]) -> Result<Answer> {
        self.send(request, payload, files)?;
        self.receive(request)
    }

    /// Sends anything: `size` need not be the length of `payload`.
    pub fn send_raw(
        &self,
        request: u32,
        flags: u32,
        size: u32,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend_from_slice(&request.to_le_bytes());
        message.extend_from_slice(&flags.to_le_bytes());
        message.extend_from_slice(&size.to_le_bytes());
        message.extend_from_slice(payload);
        let mut space = [MaybeUninit::uninit(); 1024];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(Error::Usage(format!(
                "{} descriptors are too many for one message",
                files.len()
            )));
        }
        let sent = rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(&message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .map_err(|e| Error::io(format!("send message {request}"), e))?;
        if sent != message.len() {
            return Err(Error::Usage(format!("{sent} of {} bytes sent", message.len())));
        }
        Ok(())
    }

    /// Waits for the answer to `request`.
    pub fn receive(&self, request: Request) -> Result<Answer> {
        let mut header = [0; HEADER];
        let files = self.fill(request, &mut header)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (code, flags, size) = (word(0), word(4), word(8));
        if code != request as u32 || flags & (REPLY | 3) != REPLY | VERSION {
            return Err(Error::Device(format!(
                "answer {code} with flags {flags:#x} to {request:?}"
            )));
        }
        if size > 65536 {
            return Err(Error::Device(format!("answer of {size} bytes to {request:?}")));
        }
        let mut payload = vec![0; size as usize];
        let mut more = self.fill(request, &mut payload)?;
        more.extend(files);
        Ok(Answer { payload, files: more })
    }

    /// Waits until the device closes the connection.
    pub fn wait_closed(&self) -> Result<()> {
        let mut byte = [0; 64];
        loop {
            match rustix::net::recv(&self.stream, &mut byte, RecvFlags::empty()) {
                Ok((_, 0)) | Err(rustix::io::Errno::CONNRESET) => return Ok(()),
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(Error::Timeout {
                        what: "end of the connection".into(),
                        waited: self.timeout,
                    });
                }
                Err(e) => return Err(Error::io("wait for the end of the connection", e)),
            }
        }
    }

    fn fill(&self, request: Request, into: &mut [u8]) -> Result<Vec<OwnedFd>> {
        let mut files = Vec::new();
        let mut done = 0;
        while done < into.len() {
            let mut space = [MaybeUninit::uninit(); 256];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut into[done..])],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            match received {
                Ok(message) if message.bytes == 0 => {
                    return Err(Error::io(
                        format!("answer to {request:?}"),
                        io::Error::from(io::ErrorKind::UnexpectedEof),
                    ));
                }
                Ok(message) => done += message.bytes,
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(Error::Timeout {
                        what: format!("answer to {request:?}"),
                        waited: self.timeout,
                    });
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(Error::io(format!("answer to {request:?}"), e)),
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    files.extend(rights);
                }
            }
        }
        Ok(files)
    }
}

/// Little-endian payload of 64-bit words.
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Payload of SET_VRING_NUM, BASE and ENABLE.
pub fn vring_state(index: usize, value: u32) -> Vec<u8> {
    [(index as u32).to_le_bytes(), value.to_le_bytes()].concat()
}
