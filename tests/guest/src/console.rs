//! The host's half of the conversation with the agent in the guest (`init.sh`), and the watch over the kernel's console.
//!
//! Two threads read what the guest says and write it down in one place, [`Shared`]; whoever waits for something waits
//! there, with a deadline. Nothing is polled.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// What a finished command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit status; 137 when it was killed for taking too long.
    pub status: i32,
    /// What it wrote to its standard output and error.
    pub text: String,
}

/// Why a guest will not answer any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Its kernel panicked.
    Panic,
    /// QEMU ended.
    Exit,
}

#[derive(Default)]
struct State {
    finished: HashMap<u64, Output>,
    console: String,
    end: Option<End>,
}

/// What the reading threads know, and who waits for it.
#[derive(Clone, Default)]
struct Shared {
    inner: Arc<(Mutex<State>, Condvar)>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.inner.1.notify_all();
    }
}

/// The conversation with one guest.
pub struct Console {
    shared: Shared,
    agent: UnixStream,
    last: u64,
}

impl Console {
    /// Starts to listen to the agent's port and to the kernel's console.
    pub fn start(agent: UnixStream, kernel: impl Read + Send + 'static) -> Result<Self> {
        let shared = Shared::default();
        let (for_agent, for_kernel) = (shared.clone(), shared.clone());
        let answers = BufReader::new(agent.try_clone()?);
        thread::Builder::new()
            .name("guest-agent".into())
            .spawn(move || read_answers(answers, &for_agent))?;
        thread::Builder::new()
            .name("guest-console".into())
            .spawn(move || read_console(kernel, &for_kernel))?;
        Ok(Self {
            shared,
            agent,
            last: 0,
        })
    }

    /// Waits until the agent has said that it is there. `Ok(Some(end))` when the guest ended instead.
    pub fn wait_for_agent(&self, patience: Duration) -> Result<Option<End>> {
        match self.wait(0, Instant::now() + patience) {
            Waited::Finished(_) => Ok(None),
            Waited::Ended(end) => Ok(Some(end)),
            Waited::TooLong => bail!(
                "the guest did not come up within {patience:?}; its console ends:\n{}",
                self.tail()
            ),
        }
    }

    /// Forgets what has come, ahead of a reset of the machine.
    pub fn forget(&self) {
        self.shared.change(|state| state.finished.clear());
    }

    /// Starts a shell script in the guest. It is killed after `limit`.
    pub fn start_script(&mut self, script: &str, limit: Duration) -> Result<Ticket> {
        self.last += 1;
        let seconds = limit.as_secs().max(1);
        let line = format!("{} {seconds} {}\n", self.last, STANDARD.encode(script));
        self.agent
            .write_all(line.as_bytes())
            .context("send a command to the guest")?;
        Ok(Ticket { id: self.last, limit })
    }

    /// Waits for a started script.
    ///
    /// A script that even the kill at its limit does not end hangs in the kernel; that is an error and says so.
    pub fn finish(&self, ticket: &Ticket) -> Result<Output> {
        let grace = Duration::from_secs(60);
        match self.wait(ticket.id, Instant::now() + ticket.limit + grace) {
            Waited::Finished(output) => Ok(output),
            Waited::Ended(End::Panic) => {
                bail!("the guest's kernel panicked; its console ends:\n{}", self.tail())
            }
            Waited::Ended(End::Exit) => bail!("QEMU ended; the guest's console ends:\n{}", self.tail()),
            Waited::TooLong => bail!(
                "a command hangs in the guest, unkillable; its console ends:\n{}",
                self.tail()
            ),
        }
    }

    /// The script's output if it has finished.
    #[must_use]
    pub fn peek(&self, ticket: &Ticket) -> Option<Output> {
        self.shared.state().finished.get(&ticket.id).cloned()
    }

    /// All that the kernel wrote to its console.
    #[must_use]
    pub fn text(&self) -> String {
        self.shared.state().console.clone()
    }

    fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines
            .get(lines.len().saturating_sub(30)..)
            .unwrap_or_default()
            .join("\n")
    }

    fn wait(&self, id: u64, deadline: Instant) -> Waited {
        let mut state = self.shared.state();
        loop {
            if let Some(output) = state.finished.remove(&id) {
                return Waited::Finished(output);
            }
            if let Some(end) = &state.end {
                return Waited::Ended(end.clone());
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Waited::TooLong;
            };
            (state, _) = self
                .shared
                .inner
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A script that was started in the guest.
#[derive(Debug)]
pub struct Ticket {
    id: u64,
    limit: Duration,
}

enum Waited {
    Finished(Output),
    Ended(End),
    TooLong,
}

fn read_answers(mut port: impl BufRead, shared: &Shared) {
    // Ends with the connection; that the guest ended is the console's news.
    while let Ok(Some((id, output))) = read_answer(&mut port) {
        shared.change(|state| {
            state.finished.insert(id, output);
        });
    }
}

/// The next whole answer. What a reset cut off is skipped: only a head starts an answer, and ends one without an end.
fn read_answer(port: &mut impl BufRead) -> Result<Option<(u64, Output)>> {
    let mut answer: Option<(u64, i32, String)> = None;
    loop {
        let mut line = Vec::new();
        if port.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        let line = String::from_utf8_lossy(&line);
        match (
            line.split_whitespace().collect::<Vec<_>>().as_slice(),
            &mut answer,
        ) {
            (["=", id, status], _) => answer = Some((id.parse()?, status.parse()?, String::new())),
            (["."], Some((id, status, encoded))) => {
                let text = String::from_utf8_lossy(&STANDARD.decode(encoded)?).into_owned();
                return Ok(Some((
                    *id,
                    Output {
                        status: *status,
                        text,
                    },
                )));
            }
            ([part], Some((_, _, encoded))) => encoded.push_str(part),
            _ => {}
        }
    }
}

fn read_console(mut kernel: impl Read, shared: &Shared) {
    let mut buffer = [0; 4096];
    loop {
        let read = kernel.read(&mut buffer).unwrap_or(0);
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        shared.change(|state| {
            state.console.push_str(&String::from_utf8_lossy(bytes));
            if state.end.is_none() && state.console.contains("Kernel panic - not syncing") {
                state.end = Some(End::Panic);
            }
        });
    }
    shared.change(|state| {
        state.end.get_or_insert(End::Exit);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_one_by_one_and_torn_ones_skipped() {
        let mut port: &[u8] = b"= 0 0\n.\n= 7 3\naGVs\nbG8=\n.\n";
        assert_eq!(
            read_answer(&mut port).unwrap(),
            Some((
                0,
                Output {
                    status: 0,
                    text: String::new()
                }
            ))
        );
        assert_eq!(
            read_answer(&mut port).unwrap(),
            Some((
                7,
                Output {
                    status: 3,
                    text: "hello".into()
                }
            ))
        );
        assert_eq!(read_answer(&mut port).unwrap(), None);

        let mut torn: &[u8] = b"ZXI=\n.\n= 8 0\naGVs\n= 0 0\n.\n";
        assert_eq!(
            read_answer(&mut torn).unwrap(),
            Some((
                0,
                Output {
                    status: 0,
                    text: String::new()
                }
            ))
        );
    }
}
