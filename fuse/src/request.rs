//! Requests of the kernel, decoded: bytes in, values out, no effect and no panic whatever the bytes.
//!
//! `/dev/fuse` hands out one run of bytes: header, the fixed struct of the opcode, the rest.
//! Elsewhere the three stand apart, so decoding takes them apart first ([`Parts`]).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use zerocopy::FromBytes;

use crate::abi::{self, InHeader, op};
use crate::volume::{Caller, LockCall, LockKind, Owner, Range};

/// Why bytes are no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// They end before the request does.
    #[error("request too short")]
    Short,
    /// A name is missing, empty or without its end.
    #[error("name not terminated")]
    Name,
    /// A lock has an unknown type.
    #[error("unknown lock type")]
    LockType,
}

/// A request in its three parts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Who asks for what.
    pub header: InHeader,
    /// The fixed struct of the opcode, perhaps with more behind it.
    pub fixed: &'a [u8],
    /// Names and data.
    pub rest: &'a [u8],
}

impl<'a> Parts<'a> {
    /// Takes apart what was read from `/dev/fuse`.
    pub fn of_message(message: &'a [u8]) -> Result<Parts<'a>, DecodeError> {
        let (header, body) = InHeader::read_from_prefix(message).map_err(|_| DecodeError::Short)?;
        let (fixed, rest) =
            body.split_at_checked(fixed_len(header.opcode)).ok_or(DecodeError::Short)?;
        Ok(Parts { header, fixed, rest })
    }

    /// The operation that is asked for.
    pub fn decode(&self) -> Result<Operation<'a>, DecodeError> {
        Operation::decode(self)
    }
}

/// How many bytes the fixed struct of an opcode has; zero for what is refused unread.
fn fixed_len(opcode: u32) -> usize {
    match opcode {
        op::INIT => size_of::<abi::InitIn>(),
        op::FORGET => size_of::<abi::ForgetIn>(),
        op::BATCH_FORGET => size_of::<abi::BatchForgetIn>(),
        op::GETATTR => size_of::<abi::GetattrIn>(),
        op::SETATTR => size_of::<abi::SetattrIn>(),
        op::OPEN | op::OPENDIR => size_of::<abi::OpenIn>(),
        op::CREATE => size_of::<abi::CreateIn>(),
        op::READ | op::READDIR => size_of::<abi::ReadIn>(),
        op::WRITE => size_of::<abi::WriteIn>(),
        op::RELEASE | op::RELEASEDIR => size_of::<abi::ReleaseIn>(),
        op::FLUSH => size_of::<abi::FlushIn>(),
        op::FSYNC | op::FSYNCDIR => size_of::<abi::FsyncIn>(),
        op::GETLK | op::SETLK | op::SETLKW => size_of::<abi::LkIn>(),
        op::INTERRUPT => size_of::<abi::InterruptIn>(),
        _ => 0,
    }
}

/// A lock request's arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lock {
    pub fh: u64,
    pub call: LockCall,
}

/// Where and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub fh: u64,
    pub offset: u64,
    pub size: u32,
}

/// What a request asks for. The node is `InHeader::nodeid`; for a name it is the directory.
#[derive(Debug)]
pub(crate) enum Operation<'a> {
    Init(abi::InitIn),
    Lookup {
        name: &'a OsStr,
    },
    Forget {
        lookups: u64,
    },
    BatchForget(Forgets<'a>),
    Getattr,
    Setattr {
        size: Option<u64>,
    },
    Unlink {
        name: &'a OsStr,
    },
    Open,
    Create {
        name: &'a OsStr,
        flags: i32,
    },
    Read(Span),
    Write {
        fh: u64,
        offset: u64,
        from_cache: bool,
        data: &'a [u8],
    },
    Statfs,
    Release {
        fh: u64,
    },
    Flush {
        fh: u64,
        owner: Owner,
    },
    Fsync {
        fh: u64,
        data_only: bool,
    },
    Opendir,
    Readdir(Span),
    Releasedir {
        fh: u64,
    },
    Fsyncdir,
    Getlk(Lock),
    Setlk(Lock),
    Setlkw(Lock),
    Interrupt {
        unique: u64,
    },
    Destroy,
    /// There is no such operation here; this is the answer.
    Refused(Errno),
}

impl<'a> Operation<'a> {
    fn decode(parts: &Parts<'a>) -> Result<Operation<'a>, DecodeError> {
        let rest = parts.rest;
        Ok(match parts.header.opcode {
            op::INIT => Operation::Init(fixed(parts)?),
            op::LOOKUP => Operation::Lookup { name: name(rest)? },
            op::FORGET => Operation::Forget { lookups: fixed::<abi::ForgetIn>(parts)?.nlookup },
            op::BATCH_FORGET => Operation::BatchForget(Forgets::of(&fixed(parts)?, rest)?),
            op::GETATTR => Operation::Getattr,
            op::SETATTR => setattr(&fixed(parts)?),
            op::UNLINK => Operation::Unlink { name: name(rest)? },
            op::OPEN => Operation::Open,
            op::CREATE => create(&fixed(parts)?, name(rest)?),
            op::READ => Operation::Read(span(&fixed(parts)?)),
            op::WRITE => write(&fixed(parts)?, rest)?,
            op::STATFS => Operation::Statfs,
            op::RELEASE => Operation::Release { fh: fixed::<abi::ReleaseIn>(parts)?.fh },
            op::FLUSH => flush(&fixed(parts)?),
            op::FSYNC => fsync(&fixed(parts)?),
            op::OPENDIR => Operation::Opendir,
            op::READDIR => Operation::Readdir(span(&fixed(parts)?)),
            op::RELEASEDIR => Operation::Releasedir { fh: fixed::<abi::ReleaseIn>(parts)?.fh },
            op::FSYNCDIR => Operation::Fsyncdir,
            op::GETLK => Operation::Getlk(lock(&fixed(parts)?)?),
            op::SETLK => setlk(&fixed(parts)?, Operation::Setlk)?,
            op::SETLKW => setlk(&fixed(parts)?, Operation::Setlkw)?,
            op::INTERRUPT => {
                Operation::Interrupt { unique: fixed::<abi::InterruptIn>(parts)?.unique }
            }
            op::DESTROY => Operation::Destroy,
            opcode => Operation::Refused(refusal(opcode)),
        })
    }
}

/// The answer to an opcode that no call stands for. The kernel does not ask again for one whose
/// answer was ENOSYS, and does without: so ACCESS succeeds, GETXATTR before each write is saved.
fn refusal(opcode: u32) -> Errno {
    match opcode {
        op::MKDIR | op::MKNOD | op::SYMLINK | op::LINK | op::RENAME | op::RENAME2 | op::RMDIR => {
            Errno::EPERM
        }
        op::READLINK => Errno::EINVAL,
        op::FALLOCATE => Errno::EOPNOTSUPP,
        _ => Errno::ENOSYS,
    }
}

fn fixed<T: FromBytes>(parts: &Parts<'_>) -> Result<T, DecodeError> {
    T::read_from_prefix(parts.fixed).map(|(value, _)| value).map_err(|_| DecodeError::Short)
}

fn name(rest: &[u8]) -> Result<&OsStr, DecodeError> {
    match rest.iter().position(|byte| *byte == 0) {
        None | Some(0) => Err(DecodeError::Name),
        Some(end) => Ok(OsStr::from_bytes(&rest[..end])),
    }
}

fn setattr(args: &abi::SetattrIn) -> Operation<'static> {
    Operation::Setattr { size: (args.valid & abi::fattr::SIZE != 0).then_some(args.size) }
}

fn create<'a>(args: &abi::CreateIn, name: &'a OsStr) -> Operation<'a> {
    Operation::Create { name, flags: args.flags.cast_signed() }
}

fn span(args: &abi::ReadIn) -> Span {
    Span { fh: args.fh, offset: args.offset, size: args.size }
}

fn write<'a>(args: &abi::WriteIn, rest: &'a [u8]) -> Result<Operation<'a>, DecodeError> {
    let size = usize::try_from(args.size).map_err(|_| DecodeError::Short)?;
    Ok(Operation::Write {
        fh: args.fh,
        offset: args.offset,
        from_cache: args.write_flags & abi::WRITE_CACHE != 0,
        data: rest.get(..size).ok_or(DecodeError::Short)?,
    })
}

fn flush(args: &abi::FlushIn) -> Operation<'static> {
    Operation::Flush { fh: args.fh, owner: Owner(args.lock_owner) }
}

fn fsync(args: &abi::FsyncIn) -> Operation<'static> {
    Operation::Fsync { fh: args.fh, data_only: args.fsync_flags & abi::FSYNC_FDATASYNC != 0 }
}

fn lock(args: &abi::LkIn) -> Result<Lock, DecodeError> {
    let call = LockCall {
        owner: Owner(args.owner),
        process: Caller(args.lk.pid),
        range: Range { start: args.lk.start, end: args.lk.end },
        kind: lock_kind(args.lk.r#type)?,
    };
    Ok(Lock { fh: args.fh, call })
}

/// A lock request; one for flock(2) is not negotiated and refused.
fn setlk(
    args: &abi::LkIn,
    operation: fn(Lock) -> Operation<'static>,
) -> Result<Operation<'static>, DecodeError> {
    if args.lk_flags & abi::LK_FLOCK != 0 {
        return Ok(Operation::Refused(Errno::ENOSYS));
    }
    lock(args).map(operation)
}

fn lock_kind(number: u32) -> Result<LockKind, DecodeError> {
    match i32::try_from(number) {
        Ok(libc::F_RDLCK) => Ok(LockKind::Shared),
        Ok(libc::F_WRLCK) => Ok(LockKind::Exclusive),
        Ok(libc::F_UNLCK) => Ok(LockKind::Unlock),
        _ => Err(DecodeError::LockType),
    }
}

/// The nodes of a BATCH_FORGET.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Forgets<'a>(&'a [u8]);

impl<'a> Forgets<'a> {
    fn of(args: &abi::BatchForgetIn, rest: &'a [u8]) -> Result<Forgets<'a>, DecodeError> {
        usize::try_from(args.count)
            .ok()
            .and_then(|count| count.checked_mul(size_of::<abi::ForgetOne>()))
            .and_then(|len| rest.get(..len))
            .map(Forgets)
            .ok_or(DecodeError::Short)
    }

    /// Node and count of look-ups, one after the other.
    pub fn iter(self) -> impl Iterator<Item = (u64, u64)> + 'a {
        self.0
            .chunks_exact(size_of::<abi::ForgetOne>())
            .filter_map(|one| abi::ForgetOne::read_from_bytes(one).ok())
            .map(|one| (one.nodeid, one.nlookup))
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn message(opcode: u32, body: &[&[u8]]) -> Vec<u8> {
        let header = InHeader { opcode, unique: 2, nodeid: 1, ..InHeader::default() };
        let mut bytes = header.as_bytes().to_vec();
        body.iter().for_each(|part| bytes.extend_from_slice(part));
        bytes
    }

    #[test]
    fn a_name_ends_at_its_nul() {
        let bytes = message(op::LOOKUP, &[b"db-wal\0"]);
        let parts = Parts::of_message(&bytes).unwrap();
        assert!(matches!(parts.decode().unwrap(), Operation::Lookup { name } if name == "db-wal"));
        for wrong in [&b"db"[..], b"\0", b""] {
            let bytes = message(op::UNLINK, &[wrong]);
            let parts = Parts::of_message(&bytes).unwrap();
            assert_eq!(parts.decode().unwrap_err(), DecodeError::Name);
        }
    }

    #[test]
    fn a_write_has_the_bytes_it_announces() {
        let args = abi::WriteIn { fh: 7, offset: 4096, size: 3, ..Default::default() };
        let bytes = message(op::WRITE, &[args.as_bytes(), b"abc"]);
        let operation = Parts::of_message(&bytes).unwrap().decode().unwrap();
        assert!(matches!(
            operation,
            Operation::Write { fh: 7, offset: 4096, from_cache: false, data: b"abc" }
        ));
        let bytes = message(op::WRITE, &[args.as_bytes(), b"ab"]);
        let error = Parts::of_message(&bytes).unwrap().decode().unwrap_err();
        assert_eq!(error, DecodeError::Short);
    }

    #[test]
    fn a_lock_request_keeps_owner_range_and_kind() {
        let args = abi::LkIn {
            fh: 3,
            owner: 9,
            lk: abi::FileLock { start: 120, end: 127, r#type: 1, pid: 4 },
            ..Default::default()
        };
        let bytes = message(op::SETLKW, &[args.as_bytes()]);
        let call = LockCall {
            owner: Owner(9),
            process: Caller(4),
            range: Range { start: 120, end: 127 },
            kind: LockKind::Exclusive,
        };
        let expected = Lock { fh: 3, call };
        let operation = Parts::of_message(&bytes).unwrap().decode().unwrap();
        assert!(matches!(operation, Operation::Setlkw(lock) if lock == expected));
    }

    #[test]
    fn a_batch_of_forgets_is_as_long_as_it_says() {
        let ones =
            [abi::ForgetOne { nodeid: 5, nlookup: 2 }, abi::ForgetOne { nodeid: 6, nlookup: 1 }];
        let args = abi::BatchForgetIn { count: 2, dummy: 0 };
        let bytes = message(op::BATCH_FORGET, &[args.as_bytes(), ones.as_bytes()]);
        let Operation::BatchForget(forgets) = Parts::of_message(&bytes).unwrap().decode().unwrap()
        else {
            panic!("not a batch");
        };
        assert_eq!(forgets.iter().collect::<Vec<_>>(), [(5, 2), (6, 1)]);
        let args = abi::BatchForgetIn { count: u32::MAX, dummy: 0 };
        let bytes = message(op::BATCH_FORGET, &[args.as_bytes(), ones.as_bytes()]);
        let error = Parts::of_message(&bytes).unwrap().decode().unwrap_err();
        assert_eq!(error, DecodeError::Short);
    }

    /// Every opcode with every length of body, zeros and ones.
    #[test]
    fn no_bytes_make_the_decoder_panic() {
        for opcode in 0..70 {
            for fill in [0u8, 0xff] {
                let bytes = message(opcode, &[&[fill; 160]]);
                for len in 0..bytes.len() {
                    let _ = Parts::of_message(&bytes[..len]).and_then(|parts| {
                        let operation = parts.decode()?;
                        if let Operation::BatchForget(forgets) = operation {
                            assert!(forgets.iter().count() <= len);
                        }
                        Ok(())
                    });
                }
            }
        }
    }

    #[test]
    fn an_unknown_opcode_is_not_implemented() {
        let bytes = message(4711, &[]);
        let operation = Parts::of_message(&bytes).unwrap().decode().unwrap();
        assert!(matches!(operation, Operation::Refused(Errno::ENOSYS)));
    }
}
