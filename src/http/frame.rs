//! The frames of the replication stream and the position map that opens it, as bytes.
//!
//! A frame is a `u32` type and a payload; integers are big-endian, a text is a `u32` length and its
//! bytes. A frame has no length of its own, so an unknown type ends the stream.
//!
//! ```text
//! 1 LTX        u64 0, text NAME, then one LTX file in chunks: (u16 LENGTH, bytes)*, u16 0
//! 2 ready      -
//! 3 end        -
//! 4 drop-db    text NAME
//! 5 handoff    text LEASE-ID
//! 6 HWM        u64 TXID, text NAME
//! 7 heartbeat  i64 milliseconds since 1970
//!
//! position map: u32 COUNT, then COUNT times (text NAME, u64 TXID, u64 CHECKSUM)
//! ```
//!
//! Invariants: decoding is pure and never waits; bytes that are still to come are a state
//! ([`Decoded::Incomplete`]), not an error; no count or length of a peer sizes an allocation before
//! it was compared with `limits`; a stream that ends inside anything is an error.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use ltx::{Checksum, Pos, Txid};

use crate::limits;

/// The most bytes in one chunk, as its length is a `u16`.
pub const CHUNK_BYTES_MAX: usize = 65_535;
/// The bytes of the length before each chunk.
pub const CHUNK_HEADER_SIZE: usize = 2;

const TYPE_LTX: u32 = 1;
const TYPE_READY: u32 = 2;
const TYPE_END: u32 = 3;
const TYPE_DROP_DB: u32 = 4;
const TYPE_HANDOFF: u32 = 5;
const TYPE_HWM: u32 = 6;
const TYPE_HEARTBEAT: u32 = 7;

/// How much of an unknown frame is kept for the error, in bytes: old primaries write their error
/// text into the stream, and this much of it tells which.
const UNKNOWN_TEXT_BYTES_MAX: usize = 80;

/// One frame of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// An LTX file for the database `name` follows in chunks.
    Ltx {
        /// The database, as the peer wrote it.
        name: String,
    },
    /// The replica has everything the primary had when the stream began.
    Ready,
    /// The primary ends the stream without an error.
    End,
    /// The primary does not know this database (deprecated).
    DropDb {
        /// The database, as the peer wrote it.
        name: String,
    },
    /// The lease is the receiver's.
    Handoff {
        /// The lease to take over.
        lease_id: String,
    },
    /// Everything before `txid` is durable in the backup.
    Hwm {
        /// The database, as the peer wrote it.
        name: String,
        /// The high-water mark.
        txid: Txid,
    },
    /// The primary is alive and had nothing to send.
    Heartbeat {
        /// The primary's clock, in milliseconds since 1970.
        timestamp_ms: i64,
    },
}

/// What a peer sent that the protocol does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A frame type that nobody knows, so that nothing after it can be read.
    #[error("invalid stream frame type: {code:#x}{}", quoted(.text))]
    UnknownType {
        /// The type.
        code: u32,
        /// The readable bytes there, if it looks like text.
        text: String,
    },
    /// A name or lease id longer than [`limits`] allows.
    #[error("{what} of {len} bytes exceeds {max}")]
    TooLong {
        /// What the text is.
        what: &'static str,
        /// Its announced length in bytes.
        len: u32,
        /// The longest that is taken.
        max: usize,
    },
    /// A name or lease id that is not UTF-8.
    #[error("{what} is not utf-8")]
    NotUtf8 {
        /// What the text is.
        what: &'static str,
    },
    /// More position map entries than [`limits::POSITION_MAP_ENTRIES_MAX`].
    #[error("position map of {0} entries exceeds {max}", max = limits::POSITION_MAP_ENTRIES_MAX)]
    TooManyEntries(u32),
    /// A checksum without its flag bit.
    #[error("position of {name} has an invalid checksum: {checksum:016x}")]
    InvalidChecksum {
        /// The database.
        name: String,
        /// The 64 bits.
        checksum: u64,
    },
    /// Bytes after the last entry of a position map.
    #[error("{0} bytes after the position map")]
    TrailingBytes(usize),
    /// The bytes ended before what they began was complete.
    #[error("unexpected end of {what}")]
    UnexpectedEnd {
        /// What was cut off.
        what: &'static str,
    },
}

fn quoted(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text:?})") }
}

impl Frame {
    /// Appends the bytes of the frame. Chunks and their end must follow an LTX frame.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Frame::Ltx { name } => {
                out.put_u32(TYPE_LTX);
                out.put_u64(0); // a size that was never filled in and is never read
                put_text(out, name);
            }
            Frame::Ready => out.put_u32(TYPE_READY),
            Frame::End => out.put_u32(TYPE_END),
            Frame::DropDb { name } => {
                out.put_u32(TYPE_DROP_DB);
                put_text(out, name);
            }
            Frame::Handoff { lease_id } => {
                out.put_u32(TYPE_HANDOFF);
                put_text(out, lease_id);
            }
            Frame::Hwm { name, txid } => {
                out.put_u32(TYPE_HWM);
                out.put_u64(txid.0);
                put_text(out, name);
            }
            Frame::Heartbeat { timestamp_ms } => {
                out.put_u32(TYPE_HEARTBEAT);
                out.put_i64(*timestamp_ms);
            }
        }
    }
}

/// Appends `data` as chunks; nothing for empty data.
pub fn encode_chunks(data: &[u8], out: &mut BytesMut) {
    for chunk in data.chunks(CHUNK_BYTES_MAX) {
        out.put_u16(chunk.len() as u16); // chunks() gives no more than a u16 holds
        out.put_slice(chunk);
    }
}

/// Appends the end of a chunked LTX file.
pub fn encode_chunks_end(out: &mut BytesMut) {
    out.put_u16(0);
}

fn put_text(out: &mut BytesMut, text: &str) {
    debug_assert!(text.len() <= limits::PEER_NAME_BYTES_MAX.max(limits::LEASE_ID_BYTES_MAX));
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

/// What stands at the beginning of some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A whole frame in the first `len` bytes.
    Complete {
        /// The frame.
        frame: Frame,
        /// Its length in bytes.
        len: usize,
    },
    /// The beginning of a frame.
    Incomplete {
        /// How many bytes from its beginning it takes to get further; more than were given.
        need: usize,
    },
}

/// Decodes the frame at the beginning of `input`.
pub fn decode(input: &[u8]) -> Result<Decoded, Error> {
    let mut fields = Fields { input, at: 0 };
    match decode_fields(&mut fields) {
        Ok(frame) => Ok(Decoded::Complete { frame, len: fields.at }),
        Err(Halt::Incomplete { need }) => Ok(Decoded::Incomplete { need }),
        Err(Halt::Invalid(error)) => Err(error),
    }
}

fn decode_fields(fields: &mut Fields<'_>) -> Result<Frame, Halt> {
    match fields.u32()? {
        TYPE_LTX => {
            fields.u64()?;
            Ok(Frame::Ltx { name: fields.name()? })
        }
        TYPE_READY => Ok(Frame::Ready),
        TYPE_END => Ok(Frame::End),
        TYPE_DROP_DB => Ok(Frame::DropDb { name: fields.name()? }),
        TYPE_HANDOFF => {
            Ok(Frame::Handoff { lease_id: fields.text("lease id", limits::LEASE_ID_BYTES_MAX)? })
        }
        TYPE_HWM => {
            let txid = Txid(fields.u64()?);
            Ok(Frame::Hwm { txid, name: fields.name()? })
        }
        TYPE_HEARTBEAT => Ok(Frame::Heartbeat { timestamp_ms: fields.u64()? as i64 }),
        code => Err(Halt::Invalid(unknown_type(code, fields.input))),
    }
}

fn unknown_type(code: u32, input: &[u8]) -> Error {
    let line = input.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = &line[..line.len().min(UNKNOWN_TEXT_BYTES_MAX)];
    let readable = line.len() >= 4 && line.iter().all(|b| b.is_ascii_graphic() || *b == b' ');
    let text = if readable { String::from_utf8_lossy(line).into_owned() } else { String::new() };
    Error::UnknownType { code, text }
}

/// Why the fields could not all be read.
enum Halt {
    Incomplete { need: usize },
    Invalid(Error),
}

/// A cursor over bytes of a peer.
struct Fields<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Halt> {
        let need = self.at + len; // len was checked against a limit: no overflow
        let bytes = self.input.get(self.at..need).ok_or(Halt::Incomplete { need })?;
        self.at = need;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Halt> {
        Ok(self.bytes(4)?.get_u32())
    }

    fn u64(&mut self) -> Result<u64, Halt> {
        Ok(self.bytes(8)?.get_u64())
    }

    fn name(&mut self) -> Result<String, Halt> {
        self.text("database name", limits::PEER_NAME_BYTES_MAX)
    }

    fn text(&mut self, what: &'static str, max: usize) -> Result<String, Halt> {
        let len = self.u32()?;
        if len as usize > max {
            return Err(Halt::Invalid(Error::TooLong { what, len, max }));
        }
        let text = std::str::from_utf8(self.bytes(len as usize)?);
        Ok(text.map_err(|_| Halt::Invalid(Error::NotUtf8 { what }))?.to_owned())
    }
}

/// One step of a stream that is being read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A frame; after [`Frame::Ltx`] come its data and its end.
    Frame(Frame),
    /// The next bytes of the LTX file, never empty; a view into what was pushed.
    LtxData(Bytes),
    /// The LTX file is complete.
    LtxEnd,
}

/// Reads a stream piece by piece as it arrives, without copying the LTX bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Bytes pushed and not used yet.
    input: Bytes,
    /// A frame, or a chunk length, that was cut by the end of the input; bounded by the limits.
    partial: BytesMut,
    state: State,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Frame,
    ChunkLength,
    Chunk {
        remaining: usize,
    },
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Adds the next bytes. [`Decoder::next`] must have returned `None` before.
    pub fn push(&mut self, data: Bytes) {
        debug_assert!(self.input.is_empty(), "the events of the last push come first");
        self.input = data;
    }

    /// The next event, or `None` if it needs more bytes.
    #[expect(clippy::should_implement_trait, reason = "None is not the end here")]
    pub fn next(&mut self) -> Result<Option<Event>, Error> {
        match self.state {
            State::Frame => self.next_frame(),
            State::ChunkLength => Ok(self.next_chunk()),
            State::Chunk { remaining } => Ok(self.next_data(remaining)),
        }
    }

    /// Checks that the stream may end here: between two frames.
    pub fn finish(&self) -> Result<(), Error> {
        let what = match self.state {
            State::Frame if self.partial.is_empty() && self.input.is_empty() => return Ok(()),
            State::Frame => "frame",
            State::ChunkLength | State::Chunk { .. } => "ltx file",
        };
        Err(Error::UnexpectedEnd { what })
    }

    /// Whether the bytes of an LTX file are due next.
    pub fn is_inside_ltx(&self) -> bool {
        self.state != State::Frame
    }

    fn next_frame(&mut self) -> Result<Option<Event>, Error> {
        if self.partial.is_empty()
            && let Decoded::Complete { frame, len } = decode(&self.input)?
        {
            self.input.advance(len);
            return Ok(Some(self.begin(frame)));
        }
        loop {
            let need = match decode(&self.partial)? {
                Decoded::Complete { frame, .. } => {
                    self.partial.clear();
                    return Ok(Some(self.begin(frame)));
                }
                Decoded::Incomplete { need } => need,
            };
            if !self.fill_partial(need) {
                return Ok(None);
            }
        }
    }

    fn begin(&mut self, frame: Frame) -> Event {
        if matches!(frame, Frame::Ltx { .. }) {
            self.state = State::ChunkLength;
        }
        Event::Frame(frame)
    }

    fn next_chunk(&mut self) -> Option<Event> {
        if !self.fill_partial(CHUNK_HEADER_SIZE) {
            return None;
        }
        let len = usize::from(self.partial.get_u16());
        self.partial.clear();
        if len == 0 {
            self.state = State::Frame;
            return Some(Event::LtxEnd);
        }
        self.next_data(len)
    }

    fn next_data(&mut self, remaining: usize) -> Option<Event> {
        let data = self.input.split_to(remaining.min(self.input.len()));
        self.state = match remaining - data.len() {
            0 => State::ChunkLength,
            remaining => State::Chunk { remaining },
        };
        (!data.is_empty()).then_some(Event::LtxData(data))
    }

    /// Moves input to `partial` until that has `need` bytes; whether it has.
    fn fill_partial(&mut self, need: usize) -> bool {
        let missing = need - self.partial.len();
        let data = self.input.split_to(missing.min(self.input.len()));
        self.partial.extend_from_slice(&data);
        self.partial.len() == need
    }
}

/// The bytes of a position map, in the order given. Names must be valid database names.
pub fn encode_positions<'a>(positions: impl ExactSizeIterator<Item = (&'a str, Pos)>) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u32(positions.len() as u32);
    for (name, pos) in positions {
        put_text(&mut out, name);
        out.put_u64(pos.txid.0);
        out.put_u64(pos.checksum.get());
    }
    out.freeze()
}

/// Decodes a whole position map.
pub fn decode_positions(input: &[u8]) -> Result<Vec<(String, Pos)>, Error> {
    let mut fields = Fields { input, at: 0 };
    let positions = decode_entries(&mut fields).map_err(|halt| match halt {
        Halt::Incomplete { .. } => Error::UnexpectedEnd { what: "position map" },
        Halt::Invalid(error) => error,
    })?;
    match input.len() - fields.at {
        0 => Ok(positions),
        extra => Err(Error::TrailingBytes(extra)),
    }
}

fn decode_entries(fields: &mut Fields<'_>) -> Result<Vec<(String, Pos)>, Halt> {
    let count = fields.u32()?;
    if count as usize > limits::POSITION_MAP_ENTRIES_MAX {
        return Err(Halt::Invalid(Error::TooManyEntries(count)));
    }
    let mut positions = Vec::new(); // grows with the bytes that are there, not with the count
    for _ in 0..count {
        let name = fields.name()?;
        let txid = Txid(fields.u64()?);
        let checksum = fields.u64()?;
        let Some(checksum) = Checksum::from_raw(checksum) else {
            return Err(Halt::Invalid(Error::InvalidChecksum { name, checksum }));
        };
        positions.push((name, Pos { txid, checksum }));
    }
    Ok(positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer of a LiteFS primary, uncompressed, to a replica with both databases at TXID 3.
    const RAW_FROM_3: &[u8] = include_bytes!("../../tests/fixtures/stream/raw-from-3.response");
    const RAW_FROM_ZERO: &[u8] =
        include_bytes!("../../tests/fixtures/stream/raw-from-zero.response");
    const LZ4_FROM_3: &[u8] = include_bytes!("../../tests/fixtures/stream/lz4-from-3.response");
    const LZ4_FROM_ZERO: &[u8] =
        include_bytes!("../../tests/fixtures/stream/lz4-from-zero.response");
    const REQUEST_FROM_3: &[u8] = include_bytes!("../../tests/fixtures/stream/raw-from-3.request");
    const REQUEST_FROM_ZERO: &[u8] =
        include_bytes!("../../tests/fixtures/stream/raw-from-zero.request");

    /// Every event of `input`, pushed in pieces of `piece` bytes.
    fn events(input: &[u8], piece: usize) -> Result<Vec<Event>, Error> {
        let mut decoder = Decoder::new();
        let mut events = Vec::new();
        for data in input.chunks(piece) {
            decoder.push(Bytes::copy_from_slice(data));
            while let Some(event) = decoder.next()? {
                events.push(event);
            }
        }
        decoder.finish()?;
        Ok(events)
    }

    fn encode(events: &[Event]) -> BytesMut {
        let mut out = BytesMut::new();
        for event in events {
            match event {
                Event::Frame(frame) => frame.encode(&mut out),
                Event::LtxData(data) => encode_chunks(data, &mut out),
                Event::LtxEnd => encode_chunks_end(&mut out),
            }
        }
        out
    }

    /// Frames, and each LTX file as one piece whatever its chunks were.
    fn joined(events: Vec<Event>) -> Vec<(Option<Frame>, Vec<u8>)> {
        let mut joined = Vec::new();
        let mut file = Vec::new();
        for event in events {
            match event {
                Event::Frame(frame) => joined.push((Some(frame), Vec::new())),
                Event::LtxData(data) => file.extend_from_slice(&data),
                Event::LtxEnd => joined.push((None, std::mem::take(&mut file))),
            }
        }
        joined
    }

    #[track_caller]
    fn check_recording(recording: &[u8], files: usize) {
        let decoded = events(recording, recording.len()).expect("a recording is valid");
        assert_eq!(encode(&decoded), recording, "encodes to the same bytes");
        assert_eq!(decoded.iter().filter(|event| **event == Event::LtxEnd).count(), files);
        assert!(decoded.contains(&Event::Frame(Frame::Ready)));
        let heartbeat = |event: &Event| matches!(event, Event::Frame(Frame::Heartbeat { .. }));
        assert!(decoded.last().is_some_and(heartbeat), "a recording ends in its heartbeats");
        for piece in [1, 2, 3, 7, 100, 16_384] {
            let pieces = events(recording, piece).expect("pieces change nothing");
            assert_eq!(joined(pieces), joined(decoded.clone()), "in pieces of {piece}");
        }
    }

    #[test]
    fn recordings_decode_and_encode_to_the_same_bytes() {
        // wal.db from TXID 4 to 10, delete.db from 4 to 9, a snapshot of gone.db
        check_recording(RAW_FROM_3, 7 + 6 + 1);
        check_recording(LZ4_FROM_3, 7 + 6 + 1);
        check_recording(RAW_FROM_ZERO, 3);
        check_recording(LZ4_FROM_ZERO, 3);
    }

    #[test]
    fn recorded_requests_decode_and_encode_to_the_same_bytes() {
        for request in [REQUEST_FROM_3, REQUEST_FROM_ZERO] {
            let positions = decode_positions(request).expect("a recording is valid");
            let names = positions.iter().map(|(name, pos)| (name.as_str(), *pos));
            assert_eq!(encode_positions(names), request);
        }
        let positions = decode_positions(REQUEST_FROM_3).expect("a recording is valid");
        assert_eq!(positions[0].0, "wal.db");
        assert_eq!(positions[0].1.to_string(), "0000000000000003/ff6e93136c2bf215");
        assert_eq!(positions[1].0, "delete.db");
    }

    #[test]
    fn a_recording_cut_inside_a_frame_is_an_error_at_every_byte() {
        let mut boundaries = 0;
        for end in 0..LZ4_FROM_ZERO.len() {
            match events(&LZ4_FROM_ZERO[..end], end.max(1)) {
                // Whole frames before the cut: the same bytes again, nothing invented.
                Ok(decoded) => {
                    assert_eq!(encode(&decoded), LZ4_FROM_ZERO[..end]);
                    boundaries += 1;
                }
                Err(error) => assert!(matches!(error, Error::UnexpectedEnd { .. }), "{error}"),
            }
        }
        assert_eq!(boundaries, 7, "before each of three files, ready and three heartbeats");
    }

    #[test]
    fn a_position_map_cut_anywhere_is_an_error() {
        for end in 0..REQUEST_FROM_3.len() {
            let error = decode_positions(&REQUEST_FROM_3[..end]).expect_err("cut");
            assert_eq!(error, Error::UnexpectedEnd { what: "position map" });
        }
        let mut longer = REQUEST_FROM_3.to_vec();
        longer.push(0);
        assert_eq!(decode_positions(&longer), Err(Error::TrailingBytes(1)));
    }

    #[track_caller]
    fn check_invalid(input: &[u8], message: &str) {
        for piece in [1, input.len()] {
            let error = events(input, piece).expect_err("invalid");
            assert_eq!(error.to_string().split(" (").next(), Some(message));
        }
    }

    #[test]
    fn what_no_peer_may_send_is_refused() {
        check_invalid(&[0, 0, 0, 8], "invalid stream frame type: 0x8");
        check_invalid(&[0, 0, 0, 0], "invalid stream frame type: 0x0");
        check_invalid(b"stream error", "invalid stream frame type: 0x73747265");
        check_invalid(&[0, 0, 0, 4, 0, 0, 1, 0], "database name of 256 bytes exceeds 255");
        check_invalid(
            &[0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff],
            "database name of 4294967295 bytes exceeds 255",
        );
        check_invalid(&[0, 0, 0, 5, 0, 0, 1, 1], "lease id of 257 bytes exceeds 256");
        check_invalid(&[0, 0, 0, 4, 0, 0, 0, 1, 0xff], "database name is not utf-8");
    }

    #[test]
    fn an_error_text_in_the_stream_is_quoted() {
        let error = decode(b"stream error: db=x\n\0\0\0\x03").expect_err("not a frame");
        assert_eq!(
            error.to_string(),
            r#"invalid stream frame type: 0x73747265 ("stream error: db=x")"#
        );
    }

    #[test]
    fn a_position_map_is_bounded() {
        let count = (limits::POSITION_MAP_ENTRIES_MAX + 1) as u32;
        assert_eq!(decode_positions(&count.to_be_bytes()), Err(Error::TooManyEntries(count)));
        let unflagged = [&[0, 0, 0, 1, 0, 0, 0, 1, b'x'][..], &[0; 8], &[1; 8]].concat();
        assert!(matches!(decode_positions(&unflagged), Err(Error::InvalidChecksum { .. })));
    }

    /// Splitmix64: enough for test data, and a seed says all.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, end: usize) -> usize {
            (self.next() % end as u64) as usize
        }

        fn text(&mut self) -> String {
            (0..self.below(256)).map(|_| char::from(b'a' + self.below(26) as u8)).collect()
        }
    }

    fn random_events(random: &mut Random) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..random.below(20) {
            let frame = match random.below(7) {
                0 => Frame::Ltx { name: random.text() },
                1 => Frame::Ready,
                2 => Frame::End,
                3 => Frame::DropDb { name: random.text() },
                4 => Frame::Handoff { lease_id: random.text() },
                5 => Frame::Hwm { name: random.text(), txid: Txid(random.next()) },
                _ => Frame::Heartbeat { timestamp_ms: random.next() as i64 },
            };
            let is_ltx = matches!(frame, Frame::Ltx { .. });
            events.push(Event::Frame(frame));
            if is_ltx {
                let len = random.below(3) * random.below(150_000);
                let data = (0..len).map(|_| random.next() as u8).collect::<Bytes>();
                if !data.is_empty() {
                    events.push(Event::LtxData(data));
                }
                events.push(Event::LtxEnd);
            }
        }
        events
    }

    #[test]
    fn random_streams_survive_the_round_trip() {
        let seed = std::env::var("LITEFS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| std::process::id().into());
        println!("LITEFS_TEST_SEED={seed}");
        let mut random = Random(seed);
        for _ in 0..200 {
            let expected = random_events(&mut random);
            let bytes = encode(&expected);
            let piece = 1 + random.below(bytes.len() + 1);
            let decoded = events(&bytes, piece).expect("what we encode is valid");
            assert_eq!(joined(decoded), joined(expected));
        }
    }
}
