//! What must hold whatever the bytes are that a peer, a disk, a person or the kernel hands over: a panic
//! is a finding. For the fuzz targets (`fuzz/`) and the test that replays their inputs.

use bytes::Bytes;

use crate::http::frame::{self, Decoded, Decoder, Event};

mod locks;
mod sqlite;

pub use self::locks::locks;
pub use self::sqlite::{journal, wal, wal_index};
pub use crate::config::properties::config;
pub use crate::http::proxy::properties::head;

/// A property, by the name of its fuzz target.
pub type Property = (&'static str, fn(&[u8]));

/// All of them.
pub const ALL: [Property; 7] = [
    ("frames", frames),
    ("wal", wal),
    ("journal", journal),
    ("wal_index", wal_index),
    ("config", config),
    ("head", head),
    ("locks", locks),
];

/// A stream, in pieces of the length that the first byte says, says what it says as a whole; what is a
/// frame is written as it was read.
pub fn frames(bytes: &[u8]) {
    let Some((&piece, bytes)) = bytes.split_first() else { return };
    let whole = events(bytes, bytes.len().max(1));
    let pieces = events(bytes, usize::from(piece).max(1));
    assert_eq!(joined(whole.0), joined(pieces.0), "the same events");
    assert_eq!(whole.1, pieces.1, "and the same end");
    if let Ok(Decoded::Complete { frame, len }) = frame::decode(bytes) {
        let mut again = bytes::BytesMut::new();
        frame.encode(&mut again);
        assert_eq!(again.len(), len, "{frame:?}");
        assert_eq!(frame::decode(&again), Ok(Decoded::Complete { frame, len }));
    }
    if let Ok(positions) = frame::decode_positions(bytes) {
        let pairs = positions.iter().map(|(name, pos)| (name.as_str(), *pos));
        let again = frame::decode_positions(&frame::encode_positions(pairs));
        assert_eq!(again.as_ref(), Ok(&positions));
    }
}

/// The events of a stream that comes in pieces, and whether it may end there.
fn events(bytes: &[u8], piece: usize) -> (Vec<Event>, bool) {
    let mut decoder = Decoder::new();
    let mut events = Vec::new();
    for piece in bytes.chunks(piece) {
        decoder.push(Bytes::copy_from_slice(piece));
        loop {
            match decoder.next() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(_) => return (events, false),
            }
        }
    }
    (events, decoder.finish().is_ok())
}

/// Data that came in several events as one.
fn joined(events: Vec<Event>) -> Vec<(Option<Event>, Vec<u8>)> {
    let mut joined: Vec<(Option<Event>, Vec<u8>)> = Vec::new();
    for event in events {
        match (event, joined.last_mut()) {
            (Event::LtxData(data), Some((None, before))) => before.extend_from_slice(&data),
            (Event::LtxData(data), _) => joined.push((None, data.to_vec())),
            (event, _) => joined.push((Some(event), Vec::new())),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::sqlite::test_rng::Rng;

    #[test]
    fn saved_fuzz_inputs_keep_the_properties() {
        for (name, property) in ALL {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let entries = std::fs::read_dir(&dir).unwrap();
            let read = |entry: std::io::Result<std::fs::DirEntry>| {
                property(&std::fs::read(entry.unwrap().path()).unwrap());
            };
            let replayed = entries.map(read).count();
            assert!(replayed > 20, "only {replayed} inputs in {}", dir.display());
        }
    }

    #[test]
    fn bytes_by_chance_keep_the_properties() {
        let mut rng = Rng::from_env();
        for (_, property) in ALL {
            for _ in 0..300 {
                let len = rng.below(200);
                let bytes: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
                property(&bytes);
            }
        }
    }

    /// Some thousand long runs of lock calls against the model.
    #[test]
    fn lock_calls_by_chance_do_what_the_model_does() {
        let mut rng = Rng::from_env();
        for _ in 0..300 {
            let bytes: Vec<u8> = (0..2000).map(|_| rng.below(256) as u8).collect();
            locks(&bytes);
        }
    }
}
