//! POSIX locks of several processes: conflicts, waits, interrupts, closes.

use std::sync::atomic::{AtomicBool, Ordering};

use fuse::Transport;
use nix::sys::signal::Signal;

use crate::child::Process;
use crate::rings::{cpus, pin};
use crate::volume::{Mounted, TRANSPORTS, Way, mounted, wait_for};

/// A mounted file, and processes that have it open.
fn scene<const N: usize>(transport: Transport) -> (Mounted, [Process; N]) {
    let mounted = mounted(transport, Way::Passthrough);
    std::fs::File::create(mounted.path("db-shm")).unwrap();
    let open = format!("open {}", mounted.path("db-shm").display());
    let processes = std::array::from_fn(|_| {
        let mut process = Process::start();
        assert_eq!(process.tell(&open), "ok");
        process
    });
    (mounted, processes)
}

#[test]
fn a_lock_keeps_another_process_out_until_it_is_given_up() {
    for transport in TRANSPORTS {
        let (_mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        assert_eq!(b.tell("setlk w 120 1"), "EAGAIN");
        assert_eq!(b.tell("setlk r 100 50"), "EAGAIN");
        assert_eq!(b.tell("setlk w 121 1"), "ok");
        assert_eq!(a.tell("setlk u 120 1"), "ok");
        assert_eq!(b.tell("setlk w 120 1"), "ok");
    }
}

#[test]
fn readers_share_and_a_query_names_the_true_kind() {
    for transport in TRANSPORTS {
        let (_mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(b.tell("getlk w 123 1"), "free");
        assert_eq!(a.tell("setlk r 123 1"), "ok");
        assert_eq!(b.tell("setlk r 123 1"), "ok");
        assert_eq!(b.tell("getlk w 123 1"), "r 123 1");
        assert_eq!(b.tell("getlk r 123 1"), "free");
        assert_eq!(a.tell("setlk w 124 2"), "ok");
        assert_eq!(b.tell("getlk r 125 1"), "w 124 2");
    }
}

#[test]
fn a_waiting_lock_is_granted_when_it_becomes_free() {
    for transport in TRANSPORTS {
        let (mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        b.send("setlkw w 120 1");
        wait_for("b to wait", || mounted.volume.waiting() == 1);
        assert_eq!(a.tell("setlkw u 120 1"), "ok");
        assert_eq!(b.answer(), "ok");
        assert_eq!(a.tell("setlk r 120 1"), "EAGAIN");
    }
}

#[test]
fn a_signal_ends_the_wait_for_a_lock() {
    for transport in TRANSPORTS {
        let (mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        b.send("setlkw w 120 1");
        wait_for("b to wait", || mounted.volume.waiting() == 1);
        b.signal(Signal::SIGUSR1);
        assert_eq!(b.answer(), "EINTR");
        assert_eq!(mounted.volume.waiting(), 0);
        assert_eq!(a.tell("setlk u 120 1"), "ok");
        assert_eq!(b.tell("setlk w 120 1"), "ok");
    }
}

#[test]
fn a_process_that_waits_for_a_lock_can_be_killed() {
    for transport in TRANSPORTS {
        let (mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        b.send("setlkw w 120 1");
        wait_for("b to wait", || mounted.volume.waiting() == 1);
        b.child.kill().unwrap();
        b.child.wait().unwrap();
        assert_eq!(mounted.volume.waiting(), 0);
        assert_eq!(mounted.volume.held(), 1);
    }
}

/// Interrupts that come at any moment of a lock call lose neither the call nor the process.
#[test]
fn interrupts_find_their_call_at_any_moment() {
    for transport in TRANSPORTS {
        let (mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        for round in 0..300u32 {
            b.send("setlkw w 120 1");
            for _ in 0..round * 20 {
                std::hint::spin_loop();
            }
            if round % 2 == 0 {
                wait_for("b to wait", || mounted.volume.waiting() == 1);
            }
            // Sent until it is heard: a signal may also come before the call.
            let heard = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let (process, thread, heard) = (b.child.id(), b.thread, &heard);
                scope.spawn(move || {
                    wait_for("b to be interrupted", || {
                        crate::child::signal(process, thread, Signal::SIGUSR1);
                        heard.load(Ordering::Relaxed)
                    });
                });
                assert_eq!(b.answer(), "EINTR");
                heard.store(true, Ordering::Relaxed);
            });
        }
        assert_eq!(mounted.volume.waiting(), 0);
    }
}

#[test]
fn closing_any_descriptor_gives_up_the_locks_of_the_process() {
    for transport in TRANSPORTS {
        let (mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        assert_eq!(a.tell("dup"), "ok");
        assert_eq!(b.tell("setlk w 120 1"), "EAGAIN");
        assert_eq!(a.tell("close"), "ok");
        assert_eq!(b.tell("setlk w 120 1"), "ok");
        drop(b);
        wait_for("b's locks to go", || mounted.volume.held() == 0);
    }
}

#[test]
fn a_lock_of_an_open_file_lasts_until_its_release() {
    for transport in TRANSPORTS {
        let (mounted, [mut a, mut b]) = scene(transport);
        assert_eq!(a.tell("ofd w 120 1"), "ok");
        assert_eq!(a.tell("dup"), "ok");
        assert_eq!(a.tell("close"), "ok");
        assert_eq!(b.tell("setlk w 120 1"), "EAGAIN");
        assert_eq!(a.tell("close"), "ok");
        wait_for("release", || mounted.volume.held() == 0);
        assert_eq!(b.tell("setlk w 120 1"), "ok");
    }
}

/// Many calls that wait, all from one CPU, whose queue must still take the unlock.
#[test]
fn calls_that_wait_leave_room_for_the_unlock() {
    for transport in TRANSPORTS {
        let (mounted, [mut a]) = scene(transport);
        let cpu = cpus()[0];
        pin(a.thread, cpu);
        assert_eq!(a.tell("setlk w 120 1"), "ok");
        let open = format!("open {}", mounted.path("db-shm").display());
        let mut others: Vec<Process> = (0..100)
            .map(|_| {
                let mut other = Process::start();
                pin(other.thread, cpu);
                assert_eq!(other.tell(&open), "ok");
                other.send("setlkw r 120 1");
                other
            })
            .collect();
        wait_for("all to wait", || mounted.volume.waiting() == 100);
        assert_eq!(a.tell("setlk u 120 1"), "ok");
        for other in &mut others {
            assert_eq!(other.answer(), "ok");
        }
    }
}
