//! HTTP/1.1 by hand, for clients and for the application: what is on the wire is what is tested.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use crate::support::wait::DEADLINE;

/// The head and the body of a message.
#[derive(Debug, Default)]
pub struct Message {
    /// The request line or the status line.
    pub first: String,
    /// The headers, in order.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Message {
    /// The values of a header, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let wanted = self.headers.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        wanted.map(|(_, value)| value.as_str()).collect()
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn status(&self) -> u16 {
        let status = self.first.split(' ').nth(1);
        status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{}", self.first))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    /// Status and body, for comparisons.
    pub fn seen(&self) -> (u16, String) {
        (self.status(), self.text())
    }
}

/// How a body ends.
enum Length {
    Known(usize),
    Chunked,
    None,
}

/// A connection, of either side.
pub struct Connection {
    reader: BufReader<TcpStream>,
}

impl Connection {
    /// Connects to `HOST:PORT`.
    #[track_caller]
    pub fn open(address: &str) -> Connection {
        Connection::new(TcpStream::connect(address).unwrap())
    }

    pub fn new(stream: TcpStream) -> Connection {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Connection { reader: BufReader::new(stream) }
    }

    /// Another handle of the same connection, for writing.
    pub fn writer(&self) -> TcpStream {
        self.reader.get_ref().try_clone().unwrap()
    }

    /// Writes bytes as they are.
    #[track_caller]
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_write(bytes.as_ref()).unwrap();
    }

    pub fn try_write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// A line without its end; empty at the end of the stream.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        // A connection that is reset is at its end too.
        let _ = self.reader.read_line(&mut line);
        line.trim_end().to_owned()
    }

    /// Exactly so many bytes.
    #[track_caller]
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Waits for the other side's end; whether it came without more bytes.
    pub fn ends(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = self.reader.read_to_end(&mut rest);
        rest.is_empty()
    }

    /// Whether nothing comes for so long.
    pub fn is_silent_for(&self, time: Duration) -> bool {
        let socket = self.reader.get_ref();
        socket.set_read_timeout(Some(time)).unwrap();
        let come = socket.peek(&mut [0]);
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        come.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    pub fn close(self) {
        let _ = self.reader.get_ref().shutdown(Shutdown::Both);
    }

    /// The head of a message; none at the end of the stream.
    pub fn head(&mut self) -> Option<Message> {
        let first = self.line();
        if first.is_empty() {
            return None;
        }
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Some(Message { first, headers, body: Vec::new() })
    }

    /// The rest of a message whose head is here.
    #[track_caller]
    pub fn body(&mut self, message: &mut Message) {
        match length(message) {
            Length::Known(length) => message.body = self.bytes(length),
            Length::Chunked => {
                while let Some(chunk) = self.chunk() {
                    message.body.extend(chunk);
                }
            }
            Length::None => {}
        }
    }

    /// The next chunk; none at the end.
    #[track_caller]
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.line();
        let length = usize::from_str_radix(&line, 16).unwrap_or_else(|_| panic!("chunk {line:?}"));
        let chunk = self.bytes(length);
        let end = self.line();
        assert!(end.is_empty(), "after a chunk: {end}");
        (length > 0).then_some(chunk)
    }

    /// An answer to a request with this method.
    #[track_caller]
    pub fn answer(&mut self, method: &str) -> Message {
        let mut message = self.head().expect("an answer");
        let has_body = method != "HEAD" && !matches!(message.status(), 100..200 | 204 | 304);
        if has_body {
            self.body(&mut message);
        }
        message
    }

    /// Sends a request and waits for its answer. `head` is more header lines.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, head: &str, body: &[u8]) -> Message {
        let length = match body.is_empty() {
            true => String::new(),
            false => format!("content-length: {}\r\n", body.len()),
        };
        self.write(format!("{method} {path} HTTP/1.1\r\nHost: app.test\r\n{length}{head}\r\n"));
        self.write(body);
        self.answer(method)
    }
}

fn length(message: &Message) -> Length {
    if message.all("transfer-encoding").iter().any(|value| value.contains("chunked")) {
        return Length::Chunked;
    }
    match message.header("content-length") {
        Some(length) => Length::Known(length.parse().unwrap()),
        None => Length::None,
    }
}

/// One request on a connection of its own.
#[track_caller]
pub fn ask(address: &str, method: &str, path: &str, head: &str, body: &[u8]) -> Message {
    Connection::open(address).ask(method, path, head, body)
}

/// The transaction that an answer's cookie says, as a header line for the next request.
pub fn cookie(answer: &Message) -> Option<String> {
    let ours = answer.all("set-cookie").into_iter().find(|value| value.starts_with("__txid="))?;
    Some(format!("cookie: {}\r\n", ours.split(';').next().unwrap()))
}
