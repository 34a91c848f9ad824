//! What must hold of decoding and encoding, whatever the bytes are: a panic is a finding. For the
//! fuzz target and the test that replays its inputs.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use zerocopy::FromBytes;

use crate::abi;
use crate::reply::fill_directory;
use crate::request::{Operation, Parts};
use crate::volume::{DirEntry, FileType};

/// How much room a slot of a ring has for the fixed struct.
const RING_FIXED: usize = 128;

/// Takes `bytes` for a request from the device, and for names of a directory.
pub fn request(bytes: &[u8]) {
    listing(bytes);
    let Ok(parts) = Parts::of_message(bytes) else { return };
    let from_device = parts.decode();
    if let Ok(operation) = &from_device {
        consistent(operation, parts.rest);
    }
    // In a slot of a ring the fixed struct has zeros behind it.
    let mut fixed = [0; RING_FIXED];
    fixed[..parts.fixed.len()].copy_from_slice(parts.fixed);
    let from_ring = Parts { fixed: &fixed, ..parts }.decode();
    assert_eq!(format!("{from_device:?}"), format!("{from_ring:?}"), "both transports agree");
}

/// Nothing in an operation is longer than what came.
fn consistent(operation: &Operation<'_>, rest: &[u8]) {
    match operation {
        Operation::Lookup { name }
        | Operation::Unlink { name }
        | Operation::Create { name, .. } => {
            assert!(!name.is_empty() && name.len() < rest.len());
            assert!(!name.as_bytes().contains(&0));
        }
        Operation::Write { data, .. } => assert!(data.len() <= rest.len()),
        Operation::BatchForget(forgets) => {
            assert!(forgets.iter().count() * size_of::<abi::ForgetOne>() <= rest.len());
        }
        _ => {}
    }
}

/// A listing that is encoded piece by piece comes out as it went in, whatever room there is.
fn listing(bytes: &[u8]) {
    let Some((room, names)) = bytes.split_first() else { return };
    let entries: Vec<DirEntry> = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && name.len() < 256)
        .map(|name| DirEntry {
            ino: 7,
            name: OsStr::from_bytes(name).into(),
            file_type: FileType::Regular,
        })
        .collect();
    let mut buffer = vec![0xff; usize::from(*room) * 4];
    let mut read = Vec::new();
    let mut next = 0;
    loop {
        let len = fill_directory(&entries, next, &mut buffer);
        let mut lines = &buffer[..len];
        if lines.is_empty() {
            break;
        }
        while let Ok((line, rest)) = abi::Dirent::read_from_prefix(lines) {
            let name_len = line.namelen as usize;
            read.push(rest[..name_len].to_vec());
            next = line.off;
            lines = &lines[(size_of::<abi::Dirent>() + name_len).next_multiple_of(8)..];
        }
        assert!(lines.is_empty(), "whole lines");
    }
    let expected: Vec<&[u8]> = entries.iter().map(|entry| entry.name.as_bytes()).collect();
    assert_eq!(read, expected[..read.len()]);
    let fits =
        |name: &&[u8]| (size_of::<abi::Dirent>() + name.len()).next_multiple_of(8) <= buffer.len();
    assert!(expected.get(read.len()).is_none_or(|name| !fits(name)), "stops where room ends");
}
