//! The memory that a queue shares with the kernel: for each slot a header and a payload area.
//!
//! The kernel writes into a slot while one of its commands is under way, and this process while
//! none is. [`Memory`] does not know which; its caller does (`ring`), and that is what each
//! `unsafe` rests on. Nothing is ever referenced across a submission.

use std::ptr::NonNull;

use nix::errno::Errno;

use crate::abi::RingHeader;

/// What the kernel maps at once.
const PAGE: usize = 4096;

/// Headers of all slots, then their payloads, each on pages of its own; untouched pages cost nothing.
pub(super) struct Memory {
    base: NonNull<u8>,
    size: usize,
    slots: usize,
    payload_len: usize,
}

// SAFETY: the memory belongs to this value alone, and raw access to it is by unsafe functions only.
unsafe impl Send for Memory {}

impl Memory {
    /// Zeroed memory for so many slots with so much payload each, a multiple of the page size.
    pub fn new(slots: usize, payload_len: usize) -> Result<Memory, Errno> {
        assert!(slots > 0 && payload_len.is_multiple_of(PAGE), "whole pages");
        let size = memory_len(slots, payload_len);
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // Not the allocator: for memory that is aligned to pages it writes the zeros, and all of it is
        // resident from then on.
        // SAFETY: a new mapping of no file, where the kernel likes it.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, access, kind, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = NonNull::new(base.cast()).ok_or(Errno::ENOMEM)?;
        Ok(Memory { base, size, slots, payload_len })
    }

    /// Where the header of a slot and its payload are, as the kernel wants to know them.
    pub fn vectors(&self, slot: usize) -> [libc::iovec; 2] {
        [
            libc::iovec { iov_base: self.header(slot).cast(), iov_len: size_of::<RingHeader>() },
            libc::iovec { iov_base: self.payload(slot).cast(), iov_len: self.payload_len },
        ]
    }

    /// The header of a slot.
    ///
    /// # Safety
    /// No command of the slot is under way.
    pub unsafe fn read_header(&self, slot: usize) -> RingHeader {
        // SAFETY: in bounds and aligned, see `header`; any bytes are a header; nobody else writes.
        unsafe { self.header(slot).read() }
    }

    /// Replaces the header of a slot.
    ///
    /// # Safety
    /// No command of the slot is under way.
    pub unsafe fn write_header(&self, slot: usize, header: &RingHeader) {
        // SAFETY: in bounds and aligned, see `header`; nobody else reads or writes.
        unsafe { self.header(slot).write(*header) }
    }

    /// The first `len` bytes of a slot's payload, at most all.
    ///
    /// # Safety
    /// No command of the slot is under way, nor will be, and nothing is written to its payload,
    /// while the slice lives.
    pub unsafe fn read_payload(&self, slot: usize, len: usize) -> &[u8] {
        // SAFETY: in bounds, initialised since it was zeroed, and the caller keeps it unchanged.
        unsafe { std::slice::from_raw_parts(self.payload(slot), len.min(self.payload_len)) }
    }

    /// A slot's payload, to be filled.
    ///
    /// # Safety
    /// No command of the slot is under way, nor will be, and no other slice of its payload lives,
    /// while the slice lives.
    #[expect(
        clippy::mut_from_ref,
        reason = "the memory is the slot's, and a slot has one user at a time"
    )]
    pub unsafe fn payload_mut(&self, slot: usize) -> &mut [u8] {
        // SAFETY: in bounds, initialised since it was zeroed, and the caller lets nobody else near.
        unsafe { std::slice::from_raw_parts_mut(self.payload(slot), self.payload_len) }
    }

    /// Writes to a slot's payload, cut off at its end.
    ///
    /// # Safety
    /// No command of the slot is under way, and no slice of its payload lives.
    pub unsafe fn write_payload(&self, slot: usize, bytes: &[u8]) {
        let len = bytes.len().min(self.payload_len);
        // SAFETY: in bounds; `bytes` is elsewhere, since no slice of the payload lives.
        unsafe { self.payload(slot).copy_from_nonoverlapping(bytes.as_ptr(), len) }
    }

    fn header(&self, slot: usize) -> *mut RingHeader {
        assert!(slot < self.slots, "a slot of this queue");
        // SAFETY: within the allocation. The size of a header is a multiple of its alignment, and
        // the base is aligned to a page.
        unsafe { self.base.cast::<RingHeader>().add(slot).as_ptr() }
    }

    fn payload(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.slots, "a slot of this queue");
        // SAFETY: within the allocation, see `new`.
        unsafe { self.base.add(headers_len(self.slots) + slot * self.payload_len).as_ptr() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped with this size in `new`, and nobody uses it any more.
        let failed = unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) } != 0;
        debug_assert!(!failed, "unmap what was mapped");
    }
}

/// Bytes of address space for so many slots with so much payload each.
pub(super) fn memory_len(slots: usize, payload_len: usize) -> usize {
    headers_len(slots) + slots * payload_len
}

fn headers_len(slots: usize) -> usize {
    (slots * size_of::<RingHeader>()).next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_overlap() {
        let memory = Memory::new(20, PAGE).unwrap();
        for slot in 0..20 {
            let mut header: RingHeader = zerocopy::FromZeros::new_zeroed();
            header.entry.commit_id = slot as u64;
            // SAFETY: there is no kernel here, and no slice lives.
            unsafe {
                memory.write_header(slot, &header);
                memory.write_payload(slot, &vec![slot as u8; PAGE + 1]);
            }
        }
        for slot in 0..20 {
            // SAFETY: there is no kernel here, and nothing is written any more.
            let (header, payload) =
                unsafe { (memory.read_header(slot), memory.read_payload(slot, usize::MAX)) };
            assert_eq!(header.entry.commit_id, slot as u64);
            assert_eq!(payload, vec![slot as u8; PAGE]);
        }
    }

    #[test]
    fn what_was_not_touched_is_not_resident() {
        let memory = Memory::new(256, 1 << 17).unwrap();
        let resident = || {
            let mut pages = vec![0_u8; memory.size / PAGE];
            let base = memory.base.as_ptr().cast();
            // SAFETY: the whole mapping, and a byte for each of its pages.
            assert_eq!(unsafe { libc::mincore(base, memory.size, pages.as_mut_ptr()) }, 0);
            pages.iter().filter(|page| **page & 1 == 1).count()
        };
        assert_eq!(resident(), 0);
        // SAFETY: there is no kernel here, and no slice lives.
        unsafe { memory.write_payload(100, &[1]) };
        assert_ne!(resident(), 0);
    }
}
