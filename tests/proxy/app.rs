//! A small application: an HTTP server on loopback that keeps numbers in SQLite, on a mount.
//!
//! ```text
//! POST /add/KEY       adds one; the new number      GET  /get/KEY         the number
//! *    /echo          the request as text           POST /upload          length and sum of the body
//! GET  /download/N    N bytes                       GET  /chunks/N        N chunks
//! GET  /events        server-sent events, as told   GET  /socket          upgrade, then echo
//! POST /refuse        417, without reading          POST /late            answers when told to
//! GET  /close         closes instead of answering once the connection is used
//! ```

use std::fmt::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use rusqlite::Connection as Database;

use super::wire::{Connection, Message};
use crate::support::wait::DEADLINE;

/// A running application; dropped, it takes no more connections.
pub struct App {
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    database: PathBuf,
    /// One connection for all, opened when it is needed.
    connection: Mutex<Option<Database>>,
    connections: AtomicUsize,
    requests: AtomicUsize,
    stopped: AtomicBool,
    /// How often [`App::release`] was called.
    releases: Mutex<usize>,
    released: Condvar,
}

impl App {
    /// An application with its database at `database`, listening at `address`.
    pub fn start(address: &str, database: &Path) -> App {
        let listener = TcpListener::bind(address).unwrap();
        let shared = Arc::new(Shared {
            database: database.to_owned(),
            connection: Mutex::default(),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            releases: Mutex::default(),
            released: Condvar::new(),
        });
        let app = App { address: address.to_owned(), shared: shared.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stopped.load(Ordering::SeqCst) {
                    return;
                }
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let shared = shared.clone();
                std::thread::spawn(move || shared.serve(Connection::new(stream.unwrap())));
            }
        });
        app
    }

    /// How many connections it has had.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How many requests have reached it.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Closes its database until it is asked for something again.
    pub fn close(&self) {
        self.shared.connection.lock().unwrap().take();
    }

    /// Lets one more event, or one late answer, go.
    pub fn release(&self) {
        *self.shared.releases.lock().unwrap() += 1;
        self.shared.released.notify_all();
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener, which is gone then.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Shared {
    fn serve(&self, mut connection: Connection) {
        let mut is_used = false;
        while let Some(mut request) = connection.head() {
            self.requests.fetch_add(1, Ordering::SeqCst);
            let first = request.first.clone();
            let mut words = first.split(' ');
            let (method, target) = (words.next().unwrap(), words.next().unwrap());
            let path = target.split('?').next().unwrap();
            if path == "/refuse" {
                answer(&mut connection, "417 Expectation Failed", "", b"no");
                return;
            }
            if request.header("expect").is_some() {
                connection.write("HTTP/1.1 100 Continue\r\n\r\n");
            }
            connection.body(&mut request);
            match path.split('/').nth(1).unwrap_or_default() {
                "close" if is_used => return,
                "events" => return self.events(connection),
                "socket" => return socket(connection, &request),
                "late" => self.wait_for_release(0),
                _ => {}
            }
            if self.route(&mut connection, method, path, &request).is_err() {
                return; // The client has left.
            }
            is_used = true;
        }
    }

    fn route(
        &self,
        connection: &mut Connection,
        method: &str,
        path: &str,
        request: &Message,
    ) -> std::io::Result<()> {
        let mut parts = path.split('/').skip(1);
        let (name, argument) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let count = || argument.parse().unwrap();
        let (status, head, body) = match name {
            "add" => self.answer_from(|database| add(database, argument)),
            "get" => self.answer_from(|database| get(database, argument)),
            "upload" => ("200 OK", "", format!("{} {}", request.body.len(), sum(&request.body))),
            "download" => return try_answer(connection, "200 OK", "", &pattern(count())),
            "chunks" => return chunks(connection, count()),
            "cookies" => ("200 OK", "set-cookie: a=1\r\nset-cookie: b=2\r\n", String::new()),
            "hop" => (
                "200 Fine",
                "keep-alive: timeout=9\r\nconnection: keep-alive, x-mine\r\nx-mine: 1\r\nx-other: 2\r\n",
                String::new(),
            ),
            "missing" => ("404 Not Found", "", "nothing".to_owned()),
            _ => ("200 OK", "", echo(request)),
        };
        match method {
            "HEAD" => {
                let length = body.len();
                let text = format!("HTTP/1.1 {status}\r\n{head}content-length: {length}\r\n\r\n");
                connection.try_write(text.as_bytes())
            }
            _ => try_answer(connection, status, head, body.as_bytes()),
        }
    }

    fn answer_from(
        &self,
        ask: impl Fn(&Database) -> rusqlite::Result<i64>,
    ) -> (&'static str, &'static str, String) {
        let mut connection = self.connection.lock().unwrap();
        // One that was opened before the node was killed is of no use any more.
        let asked = self.ask_open(&mut connection, &ask);
        match asked.or_else(|_| self.ask_open(&mut connection, &ask)) {
            Ok(number) => ("200 OK", "", number.to_string()),
            Err(error) => ("500 Internal Server Error", "", error.to_string()),
        }
    }

    fn ask_open(
        &self,
        kept: &mut Option<Database>,
        ask: impl Fn(&Database) -> rusqlite::Result<i64>,
    ) -> rusqlite::Result<i64> {
        let database = match kept.take() {
            Some(database) => database,
            None => Database::open(&self.database)?,
        };
        database.busy_timeout(DEADLINE)?;
        let answer = ask(&database)?;
        *kept = Some(database);
        Ok(answer)
    }

    /// An event at once, and one more for each release.
    fn events(&self, mut connection: Connection) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                    transfer-encoding: chunked\r\n\r\n";
        connection.write(head);
        for number in 0.. {
            let event = format!("data: {number}\n\n");
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            if connection.try_write(chunk.as_bytes()).is_err() {
                return;
            }
            self.wait_for_release(number);
        }
    }

    fn wait_for_release(&self, number: usize) {
        let releases = self.releases.lock().unwrap();
        let wait = self.released.wait_timeout_while(releases, DEADLINE, |now| *now <= number);
        drop(wait.unwrap());
    }
}

fn add(database: &Database, key: &str) -> rusqlite::Result<i64> {
    let is_new: bool = database.query_row(
        "select count(*) = 0 from sqlite_schema where name = 'numbers'",
        [],
        |row| row.get(0),
    )?;
    if is_new {
        database.execute_batch(
            "pragma journal_mode = wal; create table numbers(key primary key, value)",
        )?;
    }
    let sql = "insert into numbers values (?, 1) on conflict do update set value = value + 1 \
               returning value";
    database.query_row(sql, [key], |row| row.get(0))
}

/// The number; zero if there is none, or no table.
fn get(database: &Database, key: &str) -> rusqlite::Result<i64> {
    let sql = "select value from numbers where key = ?";
    match database.query_row(sql, [key], |row| row.get(0)) {
        Err(rusqlite::Error::QueryReturnedNoRows) => Ok(0),
        Err(error) if error.to_string().contains("no such table") => Ok(0),
        number => number,
    }
}

fn echo(request: &Message) -> String {
    let mut text = format!("{}\n", request.first);
    for (name, value) in &request.headers {
        writeln!(text, "{name}: {value}").unwrap();
    }
    text + "\n" + &String::from_utf8_lossy(&request.body)
}

fn socket(mut connection: Connection, request: &Message) {
    let protocol = request.header("upgrade").unwrap_or_default();
    connection.write(format!(
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n"
    ));
    connection.write(b"hello");
    loop {
        let line = connection.line();
        if line.is_empty() {
            return connection.close();
        }
        connection.write(format!("echo {line}\n"));
    }
}

fn chunks(connection: &mut Connection, count: usize) -> std::io::Result<()> {
    connection.try_write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
    for number in 0..count {
        connection.try_write(format!("4\r\n{:04}\r\n", number % 10_000).as_bytes())?;
    }
    connection.try_write(b"0\r\n\r\n")
}

fn answer(connection: &mut Connection, status: &str, head: &str, body: &[u8]) {
    // The client may have left.
    let _ = try_answer(connection, status, head, body);
}

fn try_answer(
    connection: &mut Connection,
    status: &str,
    head: &str,
    body: &[u8],
) -> std::io::Result<()> {
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\n{head}content-length: {length}\r\n\r\n");
    connection.try_write(head.as_bytes())?;
    connection.try_write(body)
}

/// So many bytes that are not all the same.
pub fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

/// A sum that a moved or missing byte changes.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}
