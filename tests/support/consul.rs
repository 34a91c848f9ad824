//! A real Consul agent in memory, and links that a test can cut.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::certificates::Certificates;
use super::node::free_address;
use super::wait;

/// An agent; dropped, it is gone.
pub struct Consul {
    child: Child,
    address: String,
    /// Where it answers with TLS.
    secure: String,
    /// What it wants from everybody.
    token: String,
    _dir: tempfile::TempDir,
}

impl Consul {
    /// An agent that answers.
    #[track_caller]
    pub fn start() -> Consul {
        Consul::with(String::new(), &[])
    }

    /// An agent that wants a certificate, on its secure port, and a token; and such a token, for the keys
    /// of the tests and sessions alone.
    #[track_caller]
    pub fn secure(certificates: &Certificates) -> (Consul, String) {
        const ROOT: &str = "7a1d2e52-0000-4000-8000-c0ffee000001";
        let [ca, cert, key] = ["ca", "cert", "key"].map(|name| certificates.file(name));
        let files = format!("ca_file = {ca:?}, cert_file = {cert:?}, key_file = {key:?}");
        let files = files.replace(", ", "\n");
        let acl = format!(
            "acl {{ enabled = true\ndefault_policy = \"deny\"\ntokens {{ master = \"{ROOT}\"\nagent = \"{ROOT}\" }} }}"
        );
        let secure = free_address();
        let port = secure.rsplit_once(':').unwrap().1;
        let ports = format!("ports {{ https = {port} }}\nverify_incoming_https = true");
        let mut consul = Consul::with(ROOT.to_owned(), &[&files, &acl, &ports]);
        consul.secure = secure;
        let rules = "key_prefix \\\"test/lease\\\" {policy = \\\"write\\\"} \
                     session_prefix \\\"\\\" {policy = \\\"write\\\"}";
        let policy = format!("{{\"Name\": \"litefs\", \"Rules\": \"{rules}\"}}");
        let token = "{\"Policies\": [{\"Name\": \"litefs\"}]}";
        let put = |path: &str, body: &str| consul.request("PUT", path, body);
        wait::until("a policy", || put("/v1/acl/policy", &policy));
        let made = wait::until("a token", || put("/v1/acl/token", token));
        let made: serde_json::Value = serde_json::from_str(&made).unwrap();
        let token = made["SecretID"].as_str().expect("a secret").to_owned();
        (consul, token)
    }

    /// Where it answers with TLS.
    pub fn secure_address(&self) -> &str {
        &self.secure
    }

    #[track_caller]
    fn with(token: String, more: &[&str]) -> Consul {
        let [http, serf, wan, server] = [(); 4].map(|()| free_address());
        let port = |address: &str| address.rsplit_once(':').unwrap().1.to_owned();
        let dir = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new("consul");
        command.args(["agent", "-dev", "-bind=127.0.0.1", "-client=127.0.0.1"]);
        command.args(["-dns-port=-1", "-grpc-port=-1", "-hcl=session_ttl_min = \"500ms\""]);
        command.args(more.iter().map(|hcl| format!("-hcl={hcl}")));
        command.arg(format!("-http-port={}", port(&http)));
        command.arg(format!("-serf-lan-port={}", port(&serf)));
        command.arg(format!("-serf-wan-port={}", port(&wan)));
        command.arg(format!("-server-port={}", port(&server)));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().expect("consul is installed (.ci/packages test)");
        let consul = Consul { child, address: http, secure: String::new(), token, _dir: dir };
        wait::until_true("a leader of consul", || {
            consul.try_get("/v1/status/leader").is_some_and(|leader| leader.contains(':'))
        });
        consul
    }

    /// Where it answers, `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// The raw value of a key; none if there is no such key.
    pub fn value(&self, key: &str) -> Option<String> {
        self.try_get(&format!("/v1/kv/{key}?raw"))
    }

    /// Sets a key.
    pub fn put(&self, key: &str, value: &str) {
        self.request("PUT", &format!("/v1/kv/{key}"), value).expect("consul answers");
    }

    /// Opens a session as LiteFS does, that ends after `ttl`, and takes a key with it; its id.
    pub fn acquire(&self, key: &str, value: &str, ttl: &str) -> String {
        let session =
            format!("{{\"TTL\": \"{ttl}\", \"Behavior\": \"delete\", \"LockDelay\": \"1ms\"}}");
        // An agent that has just begun does not know itself yet.
        let made = wait::until("a session", || self.request("PUT", "/v1/session/create", &session));
        let made: serde_json::Value = serde_json::from_str(&made).unwrap();
        let id = made["ID"].as_str().expect("an id").to_owned();
        assert!(self.take(key, value, &id));
        id
    }

    /// Takes a key with a session, as LiteFS takes a lease that it was offered; whether it has it.
    pub fn take(&self, key: &str, value: &str, session: &str) -> bool {
        let taken = self.request("PUT", &format!("/v1/kv/{key}?acquire={session}"), value);
        taken.as_deref().map(str::trim) == Some("true")
    }

    /// Renews a session; whether it is still there.
    pub fn renew(&self, session: &str) -> bool {
        self.request("PUT", &format!("/v1/session/renew/{session}"), "").is_some()
    }

    /// Removes a key.
    pub fn delete(&self, key: &str) {
        self.request("DELETE", &format!("/v1/kv/{key}"), "").expect("consul answers");
    }

    fn try_get(&self, path: &str) -> Option<String> {
        self.request("GET", path, "")
    }

    /// The body of an answer of 200.
    fn request(&self, method: &str, path: &str, body: &str) -> Option<String> {
        let mut socket = TcpStream::connect(&self.address).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let len = body.len();
        write!(
            socket,
            "{method} {path} HTTP/1.0\r\nHost: consul\r\nX-Consul-Token: {}\r\n\
             Content-Length: {len}\r\n\r\n{body}",
            self.token
        )
        .ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.lines().next()?.contains(" 200 ").then(|| body.to_owned())
    }
}

impl Drop for Consul {
    fn drop(&mut self) {
        // A stopped process takes this signal too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A forwarder to an address that can be cut: while it is, what is sent goes nowhere, and nothing comes
/// back, as with a broken network.
pub struct Link {
    address: String,
    state: Arc<State>,
}

struct State {
    cut: AtomicBool,
    /// Bytes a second in each direction of a connection; zero for no limit.
    limit: AtomicU64,
    ended: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
    /// Connections so far.
    accepted: AtomicU64,
}

impl Link {
    /// A link to `target`.
    pub fn to(target: &str) -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State {
            cut: AtomicBool::new(false),
            limit: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            sockets: Mutex::default(),
            accepted: AtomicU64::new(0),
        });
        let (of_thread, target) = (state.clone(), target.to_owned());
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                if of_thread.ended.load(Ordering::SeqCst) {
                    return;
                }
                of_thread.accepted.fetch_add(1, Ordering::SeqCst);
                let Ok(other) = TcpStream::connect(&target) else { continue };
                pass(&of_thread, &socket, &other);
                pass(&of_thread, &other, &socket);
                of_thread.sockets.lock().unwrap().extend([socket, other]);
            }
        });
        Link { address, state }
    }

    /// Where it listens, `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How many connections were made through it.
    pub fn connections(&self) -> u64 {
        self.state.accepted.load(Ordering::SeqCst)
    }

    /// Lets so many bytes a second through each connection and direction; zero for no limit.
    pub fn limit(&self, bytes_per_second: u64) {
        self.state.limit.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Cuts it.
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
    }

    /// Mends it: connections of before are broken, new ones work.
    pub fn mend(&self) {
        for socket in self.state.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.state.cut.store(false, Ordering::SeqCst);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        self.mend();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(&self.address);
    }
}

/// Passes on what comes from one socket to the other, in a thread of its own.
fn pass(state: &Arc<State>, from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    let state = state.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if !state.cut.load(Ordering::SeqCst) && to.write_all(&buffer[..len]).is_err() {
                break;
            }
            let limit = state.limit.load(Ordering::SeqCst);
            if limit > 0 {
                let end = Instant::now() + Duration::from_secs_f64(len as f64 / limit as f64);
                while Instant::now() < end && !state.ended.load(Ordering::SeqCst) {
                    std::thread::park_timeout(Duration::from_millis(5));
                }
            }
        }
        if !state.cut.load(Ordering::SeqCst) {
            let _ = to.shutdown(Shutdown::Both);
        }
    });
}
