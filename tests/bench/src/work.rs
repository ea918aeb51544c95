//! What guests do: one type for each row of the table.

use rafsd_frontend::abi::{Writer, opcode};
use rafsd_frontend::random::Random;

use crate::load::{Next, Slot, Work};

/// Asserts that a reply is not an error; a benchmark of errors would be worthless.
fn good(reply: &Slot, what: &str) {
    assert!(reply.error() == 0, "{what} failed with {}", reply.error());
}

/// Fields of READ, WRITE, READDIR.
fn io_argument(fh: u64, offset: u64, size: u32) -> Vec<u8> {
    Writer::new()
        .u64(fh)
        .u64(offset)
        .u32(size)
        .u32(0)
        .u64(0)
        .u32(0)
        .u32(0)
        .0
}

/// The same request again and again.
pub struct Same {
    opcode: u32,
    nodeid: u64,
    argument: Vec<u8>,
    room: u32,
}

impl Same {
    /// GETATTR of one node.
    pub fn getattr(nodeid: u64) -> Self {
        Self {
            opcode: opcode::GETATTR,
            nodeid,
            argument: vec![0; 16],
            room: 104,
        }
    }

    /// READDIRPLUS from the start of a directory.
    pub fn readdirplus(nodeid: u64, fh: u64) -> Self {
        Self {
            opcode: opcode::READDIRPLUS,
            nodeid,
            argument: io_argument(fh, 0, 32768),
            room: 32768,
        }
    }
}

impl Work for Same {
    fn next(&mut self, _slot: usize, reply: Option<&Slot>, next: &mut Next) {
        match reply {
            Some(reply) => {
                good(reply, "request");
                next.finished = true;
            }
            None => {
                *next = Next {
                    opcode: self.opcode,
                    nodeid: self.nodeid,
                    argument: self.argument.clone(),
                    room: self.room,
                    ..Next::default()
                };
            }
        }
    }
}

/// LOOKUP of one name after the other; with `stat` a GETATTR of what was found as well.
pub struct Walk {
    /// (directory, name with NUL).
    pub names: Vec<(u64, Vec<u8>)>,
    /// Whether to GETATTR.
    pub stat: bool,
    /// Where it is.
    pub at: usize,
}

impl Walk {
    fn lookup(&mut self, next: &mut Next) {
        let (directory, name) = &self.names[self.at % self.names.len()];
        self.at += 1;
        next.opcode = opcode::LOOKUP;
        next.nodeid = *directory;
        next.argument.clone_from(name);
        next.room = 128;
    }
}

impl Work for Walk {
    fn next(&mut self, _slot: usize, reply: Option<&Slot>, next: &mut Next) {
        next.finished = false;
        if let Some(reply) = reply {
            good(reply, "walk");
            if self.stat && next.opcode == opcode::LOOKUP {
                next.opcode = opcode::GETATTR;
                next.nodeid = reply.body_u64(0);
                next.argument.clear();
                next.argument.resize(16, 0);
                next.room = 104;
                return;
            }
            next.finished = true;
        }
        self.lookup(next);
    }
}

/// OPEN, READ, RELEASE of one small file after the other.
pub struct Small {
    /// The files' nodes.
    pub nodes: Vec<u64>,
    /// Where it is.
    pub at: usize,
}

impl Work for Small {
    fn next(&mut self, _slot: usize, reply: Option<&Slot>, next: &mut Next) {
        next.finished = false;
        match reply.map(|reply| (reply, next.opcode)) {
            Some((reply, opcode::OPEN)) => {
                good(reply, "OPEN");
                next.opcode = opcode::READ;
                next.argument = io_argument(reply.body_u64(0), 0, 4096);
                next.room = 4096;
                return;
            }
            Some((reply, opcode::READ)) => {
                good(reply, "READ");
                next.opcode = opcode::RELEASE;
                next.argument.truncate(8);
                next.argument.resize(24, 0);
                next.room = 0;
                return;
            }
            Some((reply, _)) => {
                good(reply, "RELEASE");
                next.finished = true;
            }
            None => {}
        }
        next.opcode = opcode::OPEN;
        next.nodeid = self.nodes[self.at % self.nodes.len()];
        self.at += 1;
        next.argument.clear();
        next.argument.resize(8, 0);
        next.room = 16;
    }
}

/// READ or WRITE of one file, one piece after the other or at random.
pub struct Data {
    /// The file.
    pub nodeid: u64,
    /// Its handle.
    pub fh: u64,
    /// Its size.
    pub len: u64,
    /// Bytes of a piece.
    pub piece: u32,
    /// Whether to write.
    pub write: bool,
    /// At random places; otherwise in order.
    pub random: Option<Random>,
    /// Where it is.
    pub at: u64,
}

impl Work for Data {
    fn next(&mut self, _slot: usize, reply: Option<&Slot>, next: &mut Next) {
        if let Some(reply) = reply {
            good(reply, "READ or WRITE");
            assert!(
                self.write || reply.length() == 16 + self.piece,
                "{} bytes read",
                reply.length()
            );
            next.finished = true;
        }
        let pieces = self.len / u64::from(self.piece);
        let number = match &mut self.random {
            Some(random) => random.below(pieces as usize) as u64,
            None => self.at % pieces,
        };
        self.at += 1;
        next.opcode = if self.write { opcode::WRITE } else { opcode::READ };
        next.nodeid = self.nodeid;
        next.argument = io_argument(self.fh, number * u64::from(self.piece), self.piece);
        (next.write, next.room) = if self.write {
            (self.piece, 8)
        } else {
            (0, self.piece)
        };
    }
}

/// CREATE, WRITE of 4 KiB, RELEASE, UNLINK, FORGET, each slot in a name of its own.
pub struct Files {
    /// The directory.
    pub directory: u64,
    /// Nodes and handles of the slots.
    pub open: Vec<(u64, u64)>,
}

impl Work for Files {
    fn next(&mut self, slot: usize, reply: Option<&Slot>, next: &mut Next) {
        next.finished = false;
        next.write = 0;
        self.open.resize(self.open.len().max(slot + 1), (0, 0));
        let (nodeid, fh) = &mut self.open[slot];
        if let Some(reply) = reply {
            // FORGET has no reply.
            if next.opcode != opcode::FORGET {
                good(reply, "create, write, unlink");
            }
            match next.opcode {
                opcode::CREATE => {
                    (*nodeid, *fh) = (reply.body_u64(0), reply.body_u64(128));
                    next.opcode = opcode::WRITE;
                    next.nodeid = *nodeid;
                    next.argument = io_argument(*fh, 0, 4096);
                    (next.write, next.room) = (4096, 8);
                    return;
                }
                opcode::WRITE => {
                    next.opcode = opcode::RELEASE;
                    next.argument = Writer::new().u64(*fh).u64(0).u64(0).0;
                    next.room = 0;
                    return;
                }
                opcode::RELEASE => {
                    next.opcode = opcode::UNLINK;
                    next.nodeid = self.directory;
                    next.argument = format!("bench-{slot}\0").into_bytes();
                    return;
                }
                opcode::UNLINK => {
                    next.opcode = opcode::FORGET;
                    next.nodeid = *nodeid;
                    next.argument = 1u64.to_le_bytes().to_vec();
                    return;
                }
                _ => next.finished = true,
            }
        }
        next.opcode = opcode::CREATE;
        next.nodeid = self.directory;
        let fields = Writer::new().u32(0o102).u32(0o644).u32(0).u32(0);
        next.argument = fields.bytes(format!("bench-{slot}\0").as_bytes()).0;
        next.room = 144;
    }
}
