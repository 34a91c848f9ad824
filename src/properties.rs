//! What must hold whatever the bytes are that a peer, a disk, a person or the kernel hands over: a panic
//! is a finding. For the fuzz targets (`fuzz/`) and the test that replays their inputs.

use bytes::Bytes;

use crate::http::frame::{self, Decoded, Decoder, Event};

mod locks;
mod sqlite;

pub use self::locks::locks;
pub use self::sqlite::{journal, wal, wal_index};
pub use crate::cluster::backup::cloud::properties::backup;
pub use crate::cluster::consul::properties::consul;
pub use crate::config::properties::config;
pub use crate::http::properties::{events, import, tx};
pub use crate::http::proxy::properties::head;

/// A property, by the name of its fuzz target.
pub type Property = (&'static str, fn(&[u8]));

/// All of them.
pub const ALL: [Property; 13] = [
    ("frames", frames),
    ("wal", wal),
    ("journal", journal),
    ("wal_index", wal_index),
    ("config", config),
    ("head", head),
    ("locks", locks),
    ("import", import),
    ("tx", tx),
    ("events", events),
    ("consul", consul),
    ("backup", backup),
    ("data_dir", data_dir),
];

/// A directory in memory, where there is one: what is written there is synced at once.
pub(crate) fn ram_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

/// A stream, in pieces of the length that the first byte says, says what it says as a whole; what is a
/// frame is written as it was read.
pub fn frames(bytes: &[u8]) {
    let Some((&piece, bytes)) = bytes.split_first() else { return };
    let whole = decoded(bytes, bytes.len().max(1));
    let pieces = decoded(bytes, usize::from(piece).max(1));
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

/// The files of a data directory that a start reads beside the databases.
pub fn data_dir(bytes: &[u8]) {
    crate::engine::properties::data_dir(bytes);
    crate::cluster::memory::properties::memory(bytes);
}

/// The events of a stream that comes in pieces, and whether it may end there.
fn decoded(bytes: &[u8], piece: usize) -> (Vec<Event>, bool) {
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
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::sqlite::test_rng::Rng;

    /// The saved inputs of a fuzz target, by their paths.
    fn saved(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let paths = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let mut saved: Vec<_> =
            paths.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
        saved.sort();
        assert!(saved.len() > 20, "only {} inputs in {}", saved.len(), dir.display());
        saved
    }

    #[test]
    fn saved_fuzz_inputs_keep_the_properties() {
        for (name, property) in ALL {
            for (path, bytes) in saved(name) {
                // Shown if it fails.
                println!("{}", path.display());
                property(&bytes);
            }
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

    /// As many for each as `LITEFS_TEST_INPUTS` says.
    #[test]
    fn saved_fuzz_inputs_that_were_changed_keep_the_properties() {
        let count = std::env::var("LITEFS_TEST_INPUTS").ok().map(|text| text.parse().unwrap());
        let mut rng = Rng::from_env_or(1);
        for (name, property) in ALL {
            let saved = saved(name);
            for _ in 0..count.unwrap_or(50) {
                let bytes = changed(&mut rng, &saved);
                // Shown if it fails.
                println!("{name} {bytes:?}");
                property(&bytes);
            }
        }
    }

    fn changed(rng: &mut Rng, saved: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
        let any = |rng: &mut Rng| &saved[rng.below(saved.len() as u64) as usize].1;
        let mut bytes = any(rng).clone();
        for _ in 0..=rng.below(4) {
            let at = rng.below(bytes.len() as u64 + 1) as usize;
            match rng.below(6) {
                0 => bytes.insert(at, rng.below(256) as u8),
                1 => bytes.truncate(at),
                2 => {
                    let other = any(rng);
                    bytes.splice(at.., other[at.min(other.len())..].iter().copied());
                }
                _ if at == bytes.len() => {}
                3 => bytes[at] = [0, 1, 0x7f, 0xff][rng.below(4) as usize],
                4 => bytes[at] = rng.below(256) as u8,
                _ => bytes[at] ^= 1 << rng.below(8),
            }
        }
        bytes
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
