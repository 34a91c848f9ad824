//! The first exchange of a mount: which version, limits and features both sides have.
//!
//! Asked for on purpose: locks of the mount's own (POSIX_LOCKS), page caches that only we
//! invalidate (EXPLICIT_INVAL_DATA), backing files (PASSTHROUGH, which needs a stack depth and no
//! write-back cache). Left out on purpose: write-back cache (a write must be here when the call
//! returns), AUTO_INVAL_DATA (a changed mtime would drop the cache), ATOMIC_O_TRUNC (so that
//! O_TRUNC arrives as SETATTR), NO_OPEN_SUPPORT and READDIRPLUS. HANDLE_KILLPRIV_V2 says that no
//! file here carries privileges that a write must strip, which spares the kernel its look for
//! them at each write.

use nix::errno::Errno;

use crate::abi::{self, init};
use crate::error::Error;
use crate::mount::{PassthroughMode, Transport};

/// The most bytes that one read or write request carries.
pub(crate) const TRANSFER_MAX: usize = 1 << 20;
/// The same over io_uring, where each slot of each CPU's queue has room for it.
pub(crate) const RING_TRANSFER_MAX: usize = 128 << 10;
/// How far the kernel reads ahead: enough for a scan of a database, little for single pages.
const READAHEAD_MAX: u32 = 128 << 10;
/// How many requests nobody waits for (read-ahead, release, pages of a mapping) may be under way.
const BACKGROUND_MAX: u16 = 64;

/// The answer to INIT, and what both sides have.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub answer: abi::InitOut,
    pub passthrough: bool,
    pub uring: bool,
}

/// What this side is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready {
    pub passthrough: PassthroughMode,
    pub transport: Transport,
    /// Bytes of a page of this kernel; a request's limit is also one of pages, and a ring's slot has to hold as many.
    pub page: usize,
}

/// What to answer to the kernel's offer.
pub(crate) fn agree(offer: &abi::InitIn, ready: Ready) -> Result<Agreed, Error> {
    let version = (offer.major, offer.minor);
    if version < (abi::MAJOR, abi::MINOR_MIN) {
        return Err(Error::KernelTooOld { major: offer.major, minor: offer.minor });
    }
    let flags = (u64::from(offer.flags2) << 32 | u64::from(offer.flags)) & wanted(ready);
    let required = init::POSIX_LOCKS | init::INIT_EXT;
    if flags & required != required {
        return Err(Error::Session { doing: "negotiate fuse features", source: Errno::ENOTSUP });
    }
    let passthrough = flags & init::PASSTHROUGH != 0;
    let uring = flags & init::OVER_IO_URING != 0;
    let transfer = if uring { RING_TRANSFER_MAX } else { TRANSFER_MAX };
    let answer = abi::InitOut {
        major: abi::MAJOR,
        minor: if offer.major > abi::MAJOR {
            abi::MINOR_MAX
        } else {
            offer.minor.min(abi::MINOR_MAX)
        },
        max_readahead: offer.max_readahead.min(READAHEAD_MAX),
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: BACKGROUND_MAX / 4 * 3,
        max_write: transfer as u32,
        time_gran: 1,
        max_pages: (transfer / ready.page).max(1) as u16,
        max_stack_depth: u32::from(passthrough),
        ..abi::InitOut::default()
    };
    Ok(Agreed { answer, passthrough, uring })
}

fn wanted(ready: Ready) -> u64 {
    let always = init::ASYNC_READ
        | init::POSIX_LOCKS
        | init::BIG_WRITES
        | init::PARALLEL_DIROPS
        | init::MAX_PAGES
        | init::EXPLICIT_INVAL_DATA
        | init::HANDLE_KILLPRIV_V2
        | init::INIT_EXT
        | init::DIRECT_IO_ALLOW_MMAP;
    let passthrough = match ready.passthrough {
        PassthroughMode::Auto => init::PASSTHROUGH,
        PassthroughMode::Off => 0,
    };
    let uring = match ready.transport {
        Transport::Uring => init::OVER_IO_URING,
        Transport::Auto | Transport::Dev => 0,
    };
    always | passthrough | uring
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(minor: u32, flags: u64) -> abi::InitIn {
        abi::InitIn {
            major: 7,
            minor,
            max_readahead: 1 << 20,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            ..abi::InitIn::default()
        }
    }

    const AUTO: Ready =
        Ready { passthrough: PassthroughMode::Auto, transport: Transport::Dev, page: 4096 };

    #[test]
    fn only_what_is_offered_and_wanted_is_agreed() {
        let agreed = agree(&offer(45, u64::MAX), AUTO).unwrap();
        assert!(agreed.passthrough);
        assert_eq!(agreed.answer.max_stack_depth, 1);
        assert_eq!(agreed.answer.flags & (1 << 16), 0, "write-back cache");
        let ready =
            Ready { passthrough: PassthroughMode::Off, transport: Transport::Uring, page: 4096 };
        let agreed = agree(&offer(45, u64::MAX), ready).unwrap();
        assert!(!agreed.passthrough && agreed.uring);
        assert_eq!((agreed.answer.max_write, agreed.answer.max_pages), (128 << 10, 32));
        let agreed = agree(&offer(45, u64::MAX), Ready { page: 64 << 10, ..ready }).unwrap();
        assert_eq!((agreed.answer.max_write, agreed.answer.max_pages), (128 << 10, 2));
        let old = init::INIT_EXT | init::POSIX_LOCKS;
        let agreed = agree(&offer(36, old), AUTO).unwrap();
        assert!(!agreed.passthrough);
        assert_eq!((agreed.answer.minor, agreed.answer.flags2), (36, 0));
    }

    #[test]
    fn a_kernel_that_is_too_old_is_named() {
        let error = agree(&offer(31, u64::MAX), AUTO).unwrap_err();
        assert!(matches!(error, Error::KernelTooOld { major: 7, minor: 31 }));
    }
}
