//! The machine starts: it may come before the daemon, it asks for more queues than one, and every message is acknowledged.

use std::time::Duration;

use rafsd_frontend::daemon::Builder;
use rafsd_frontend::message::protocol;
use rafsd_frontend::ops;
use rafsd_frontend::{Guest, Options};

use crate::machine::Machine;
use crate::twins::{self, RAFSD, Work};

#[test]
fn twin() {
    // The program tries to connect every 100 ms from before the daemon is there.
    let builder = Builder::new(RAFSD).unwrap();
    let socket = builder.directory().join("vhost.sock");
    let shared = builder.directory().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let many = Options {
        request_queues: 4,
        ..twins::options()
    };
    let early = std::thread::spawn(move || twins::until(|| Guest::connect(&socket, many.clone())));
    std::thread::sleep(Duration::from_millis(50));
    let daemon = builder.start().unwrap();
    daemon.mount_passthrough("/", &shared).unwrap();
    let guest = early.join().unwrap();
    {
        let vmm = guest.vmm();
        assert!(
            vmm.connection.reply_ack,
            "REPLY_ACK is what the program builds on"
        );
        assert!(vmm.queue_limit >= 5);
        for bit in [protocol::MQ, protocol::CONFIGURE_MEM_SLOTS, protocol::LOG_SHMFD] {
            assert!(vmm.has_protocol(bit), "protocol feature {bit:#x}");
        }
    }
    guest.init(&ops::Init::default()).unwrap();
    let mut work = Work::new(&guest, "file");
    let tickets = work.start(&guest);
    work.finish(&guest, tickets);
    for queue in 1..5 {
        let ticket = guest.submit_on(queue, &ops::getattr(work.node, None)).unwrap();
        assert_eq!(guest.wait(ticket).unwrap().errno, 0);
    }
    assert!(shared.join("file").exists());
    twins::assert_idle(&guest);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("activation") else {
        return;
    };
    machine.run("echo written by the guest >/mnt/shared/file");
    let text = std::fs::read_to_string(machine.shared().join("file")).unwrap();
    assert_eq!(text, "written by the guest\n");
    assert_eq!(machine.run("ls /mnt/shared | grep file"), "file\n");
    machine.end();
}
