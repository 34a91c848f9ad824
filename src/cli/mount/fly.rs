//! The role of this node in the metadata of its Fly.io machine: `POST .../metadata/role` over the
//! machine's socket, as LiteFS says it. Informational only: what fails is tried again a few times, and a
//! later role takes the place of an earlier one.
//!
//! The last role, after the lease was given up, is told too: [`RoleReport`] waits for that when it is
//! dropped, for one attempt at the most.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::config::Environment;
use crate::engine::{Engine, Event, EventWatch};

/// Where a machine of Fly.io reaches its API.
const SOCKET: &str = "/.fly/api";
/// How often a role is told before it is given up.
const ATTEMPTS: u32 = 6;
/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// How long one attempt may take to send, and to be answered.
const WAIT: Duration = Duration::from_secs(2);

/// The machine, as its API knows it.
pub(super) struct Machine {
    socket: PathBuf,
    app: String,
    id: String,
}

impl Machine {
    /// The machine on which this process runs; none elsewhere.
    pub(super) fn of(environment: &Environment) -> Option<Machine> {
        let named = |name| environment.get(name).filter(|value| !value.is_empty());
        let (app, id) = (named("FLY_APP_NAME")?, named("FLY_MACHINE_ID")?);
        Some(Machine { socket: SOCKET.into(), app, id })
    }

    fn tell(&self, is_primary: bool) -> io::Result<()> {
        let role = if is_primary { "primary" } else { "replica" };
        let body = format!("{{\"value\":\"{role}\"}}");
        let mut socket = UnixStream::connect(&self.socket)?;
        socket.set_write_timeout(Some(WAIT))?;
        socket.set_read_timeout(Some(WAIT))?;
        write!(
            socket,
            "POST /v1/apps/{}/machines/{}/metadata/role HTTP/1.1\r\nHost: localhost\r\n\
             Connection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.app,
            self.id,
            body.len()
        )?;
        let mut status = [0; "HTTP/1.1 200".len()];
        socket.read_exact(&mut status)?;
        match &status[status.len() - 3..] {
            b"200" | b"204" => Ok(()),
            code => {
                let code = String::from_utf8_lossy(code);
                Err(io::Error::other(format!("the machine's API answers {code}")))
            }
        }
    }

    /// Tells a role, or the one that comes meanwhile; the next one, none at the end.
    fn tell_until_done(&self, mut role: bool, roles: &Receiver<bool>) -> Option<bool> {
        for attempt in 1..=ATTEMPTS {
            role = roles.try_iter().last().unwrap_or(role);
            let Err(error) = self.tell(role) else { return roles.recv().ok() };
            if attempt == ATTEMPTS {
                tracing::warn!(%error, "the role is not in the metadata of the Fly.io machine");
                break;
            }
            match roles.recv_timeout(PAUSE) {
                Ok(newer) => return Some(newer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        roles.recv().ok()
    }
}

/// Tells each change of the role until it is dropped.
pub(super) struct RoleReport {
    watch: Option<EventWatch>,
    thread: Option<JoinHandle<()>>,
}

impl RoleReport {
    /// Begins with "replica".
    pub(super) fn start(machine: Machine, engine: &Engine) -> RoleReport {
        let (sender, roles) = mpsc::channel();
        let watch = engine.watch_events(Box::new(move |event| {
            if let Event::PrimaryChange { is_primary, .. } = event {
                // The thread ends only after this.
                let _ = sender.send(*is_primary);
            }
        }));
        let thread = thread::spawn(move || {
            let mut role = Some(false);
            while let Some(is_primary) = role {
                role = machine.tell_until_done(is_primary, &roles);
            }
        });
        RoleReport { watch: Some(watch), thread: Some(thread) }
    }
}

impl Drop for RoleReport {
    fn drop(&mut self) {
        drop(self.watch.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic, and nobody could do anything about it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use ltx::{Compression, NodeId};

    use super::*;
    use crate::engine::{Options, Retain, Role};

    /// What the next caller says; it is answered with `code`.
    fn answer(listener: &UnixListener, code: &str) -> String {
        let (mut socket, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\"}") {
            socket.read_exact(&mut byte).unwrap();
            request.push(byte[0]);
        }
        // In one piece: who has read the code hangs up.
        let response = format!("HTTP/1.1 {code} x\r\nContent-Length: 0\r\n\r\n");
        socket.write_all(response.as_bytes()).unwrap();
        String::from_utf8(request).unwrap()
    }

    /// `docs/differences.md`, cluster 54.
    #[test]
    fn the_role_is_told_at_each_change_and_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let engine = Engine::open(Options {
            dir: dir.path().join("data"),
            compression: Compression::None,
            retention: Duration::ZERO,
            retention_interval: Duration::ZERO,
            retain: Retain::Free,
            strict_verify: false,
            node_id: NodeId(1),
            clock: Box::new(|| 1),
        });
        let engine = engine.unwrap();
        let machine = Machine { socket, app: "app".to_owned(), id: "m1".to_owned() };
        let report = RoleReport::start(machine, &engine);
        let told = answer(&listener, "200");
        assert!(told.starts_with("POST /v1/apps/app/machines/m1/metadata/role HTTP/1.1\r\n"));
        assert!(told.ends_with("\r\n\r\n{\"value\":\"replica\"}"), "{told}");
        engine.set_role(Role::Primary);
        // A refusal is not the end.
        assert!(answer(&listener, "503").ends_with("{\"value\":\"primary\"}"));
        assert!(answer(&listener, "204").ends_with("{\"value\":\"primary\"}"));
        engine.set_role(Role::Unknown);
        let end = thread::spawn(move || drop(report));
        assert!(answer(&listener, "200").ends_with("{\"value\":\"replica\"}"));
        end.join().unwrap();
        engine.close().unwrap();
    }

    #[test]
    fn nothing_is_told_elsewhere_than_on_fly_io() {
        let app = ("FLY_APP_NAME", "a");
        assert!(Machine::of(&Environment::from([])).is_none());
        assert!(Machine::of(&Environment::from([app])).is_none());
        assert!(Machine::of(&Environment::from([app, ("FLY_MACHINE_ID", "")])).is_none());
        assert!(Machine::of(&Environment::from([app, ("FLY_MACHINE_ID", "m")])).is_some());
    }
}
