//! The kernel's interface: the structs and numbers of `linux/fuse.h`, protocol 7.36 to 7.45.
//!
//! Every message from the kernel is an [`InHeader`], the fixed struct of its opcode, and then
//! names or data; every answer is an [`OutHeader`] and the fixed struct of the answer or data.
//! A message to the kernel that answers nothing (a notification) has `unique` zero and its code in
//! `error`. Numbers are in the machine's byte order, structs are padded to 8 bytes, and fields
//! keep the kernel's names, in order. What this crate does not use is left out.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// FUSE_KERNEL_VERSION
pub const MAJOR: u32 = 7;
/// The oldest minor version that is understood: the first one with `flags2`.
pub const MINOR_MIN: u32 = 36;
/// The newest minor version whose structs stand here.
pub const MINOR_MAX: u32 = 45;

/// FUSE_MIN_READ_BUFFER
pub const READ_BUFFER_MIN: usize = 8192;

macro_rules! wire {
    ($($(#[$attribute:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $(pub $field: $type,)* }
    )*};
}

wire! {
    /// `fuse_in_header`
    InHeader {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }
    /// `fuse_out_header`
    OutHeader { len: u32, error: i32, unique: u64, }

    /// `fuse_init_in`
    InitIn {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        flags2: u32,
        unused: [u32; 11],
    }
    /// `fuse_init_out`
    InitOut {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        request_timeout: u16,
        unused: [u16; 11],
    }

    /// `fuse_attr`
    Attr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    /// `fuse_attr_out`
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    /// `fuse_entry_out`
    EntryOut {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    /// `fuse_forget_in`
    ForgetIn { nlookup: u64, }
    /// `fuse_forget_one`
    ForgetOne { nodeid: u64, nlookup: u64, }
    /// `fuse_batch_forget_in`
    BatchForgetIn { count: u32, dummy: u32, }
    /// `fuse_getattr_in`
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    /// `fuse_setattr_in`
    SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    /// `fuse_open_in`
    OpenIn { flags: u32, open_flags: u32, }
    /// `fuse_create_in`
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// `fuse_open_out`
    OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    /// The answer to CREATE: an entry, and the opened file right behind it.
    CreateOut { entry: EntryOut, open: OpenOut, }
    /// `fuse_release_in`
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// `fuse_flush_in`
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// `fuse_read_in`
    ReadIn {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    /// `fuse_write_in`
    WriteIn {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    /// `fuse_write_out`
    WriteOut { size: u32, padding: u32, }
    /// `fuse_kstatfs`, alone in `fuse_statfs_out`
    StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    /// `fuse_fsync_in`
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// `fuse_file_lock`
    FileLock { start: u64, end: u64, r#type: u32, pid: u32, }
    /// `fuse_lk_in`
    LkIn { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    /// `fuse_lk_out`
    LkOut { lk: FileLock, }
    /// `fuse_interrupt_in`
    InterruptIn { unique: u64, }
    /// The fixed part of `fuse_dirent`; the name follows, padded to 8 bytes.
    Dirent { ino: u64, off: u64, namelen: u32, r#type: u32, }

    /// `fuse_notify_inval_inode_out`
    NotifyInvalInode { ino: u64, off: i64, len: i64, }
    /// `fuse_notify_inval_entry_out`; the name follows, with a NUL that `namelen` does not count.
    NotifyInvalEntry { parent: u64, namelen: u32, flags: u32, }
    /// `fuse_notify_store_out`; the bytes follow.
    NotifyStore { nodeid: u64, offset: u64, size: u32, padding: u32, }
    /// `fuse_notify_delete_out`; the name follows, with a NUL that `namelen` does not count.

    /// `fuse_backing_map`
    BackingMap { fd: i32, flags: u32, padding: u64, }

    /// `fuse_uring_ent_in_out`
    RingEntry { flags: u64, commit_id: u64, payload_sz: u32, padding: u32, reserved: u64, }
    /// `fuse_uring_cmd_req`, in the command area of a submission
    RingCommand { flags: u64, commit_id: u64, qid: u16, padding: [u8; 6], }
}

/// `fuse_uring_req_header`: the fixed parts of a request, and of its answer, over io_uring.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RingHeader {
    /// An [`InHeader`] on the way in, an [`OutHeader`] on the way out.
    pub in_out: [u8; 128],
    /// The fixed struct of the opcode.
    pub op_in: [u8; 128],
    pub entry: RingEntry,
}

/// FUSE_IO_URING_CMD_REGISTER
pub const RING_REGISTER: u32 = 1;
/// FUSE_IO_URING_CMD_COMMIT_AND_FETCH
pub const RING_COMMIT_AND_FETCH: u32 = 2;

/// `enum fuse_opcode`
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;

    /// What it is called, for messages.
    pub fn name(opcode: u32) -> &'static str {
        match opcode {
            LOOKUP => "LOOKUP",
            GETATTR => "GETATTR",
            SETATTR => "SETATTR",
            READLINK => "READLINK",
            SYMLINK => "SYMLINK",
            MKNOD => "MKNOD",
            MKDIR => "MKDIR",
            UNLINK => "UNLINK",
            RMDIR => "RMDIR",
            RENAME => "RENAME",
            LINK => "LINK",
            OPEN => "OPEN",
            READ => "READ",
            WRITE => "WRITE",
            STATFS => "STATFS",
            RELEASE => "RELEASE",
            FSYNC => "FSYNC",
            FLUSH => "FLUSH",
            OPENDIR => "OPENDIR",
            READDIR => "READDIR",
            RELEASEDIR => "RELEASEDIR",
            FSYNCDIR => "FSYNCDIR",
            GETLK => "GETLK",
            SETLK => "SETLK",
            SETLKW => "SETLKW",
            CREATE => "CREATE",
            FALLOCATE => "FALLOCATE",
            RENAME2 => "RENAME2",
            _ => "another",
        }
    }
}

/// INIT flags; those from bit 32 on travel in `flags2`.
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const OVER_IO_URING: u64 = 1 << 41;
}

/// `fuse_setattr_in.valid`
pub mod fattr {
    pub const SIZE: u32 = 1 << 3;
}

/// Flags of an open's answer.
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const PASSTHROUGH: u32 = 1 << 7;
}

/// FUSE_WRITE_CACHE in `fuse_write_in.write_flags`
pub const WRITE_CACHE: u32 = 1 << 0;
/// FUSE_FSYNC_FDATASYNC in `fuse_fsync_in.fsync_flags`
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// FUSE_LK_FLOCK in `fuse_lk_in.lk_flags`
pub const LK_FLOCK: u32 = 1 << 0;

/// `enum fuse_notify_code`
pub mod notify {
    pub const INVAL_INODE: i32 = 2;
    pub const INVAL_ENTRY: i32 = 3;
    pub const STORE: i32 = 4;
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn structs_have_the_sizes_of_the_kernel_header() {
        let sizes = [
            ("fuse_in_header", size_of::<InHeader>(), 40),
            ("fuse_out_header", size_of::<OutHeader>(), 16),
            ("fuse_init_in", size_of::<InitIn>(), 64),
            ("fuse_init_out", size_of::<InitOut>(), 64),
            ("fuse_attr", size_of::<Attr>(), 88),
            ("fuse_attr_out", size_of::<AttrOut>(), 104),
            ("fuse_entry_out", size_of::<EntryOut>(), 128),
            ("fuse_forget_in", size_of::<ForgetIn>(), 8),
            ("fuse_forget_one", size_of::<ForgetOne>(), 16),
            ("fuse_batch_forget_in", size_of::<BatchForgetIn>(), 8),
            ("fuse_getattr_in", size_of::<GetattrIn>(), 16),
            ("fuse_setattr_in", size_of::<SetattrIn>(), 88),
            ("fuse_open_in", size_of::<OpenIn>(), 8),
            ("fuse_create_in", size_of::<CreateIn>(), 16),
            ("fuse_open_out", size_of::<OpenOut>(), 16),
            ("fuse_release_in", size_of::<ReleaseIn>(), 24),
            ("fuse_flush_in", size_of::<FlushIn>(), 24),
            ("fuse_read_in", size_of::<ReadIn>(), 40),
            ("fuse_write_in", size_of::<WriteIn>(), 40),
            ("fuse_write_out", size_of::<WriteOut>(), 8),
            ("fuse_statfs_out", size_of::<StatfsOut>(), 80),
            ("fuse_fsync_in", size_of::<FsyncIn>(), 16),
            ("fuse_file_lock", size_of::<FileLock>(), 24),
            ("fuse_lk_in", size_of::<LkIn>(), 48),
            ("fuse_lk_out", size_of::<LkOut>(), 24),
            ("fuse_dirent", size_of::<Dirent>(), 24),
            ("fuse_notify_inval_inode_out", size_of::<NotifyInvalInode>(), 24),
            ("fuse_notify_inval_entry_out", size_of::<NotifyInvalEntry>(), 16),
            ("fuse_notify_store_out", size_of::<NotifyStore>(), 24),
            ("fuse_backing_map", size_of::<BackingMap>(), 16),
            ("fuse_uring_ent_in_out", size_of::<RingEntry>(), 32),
            ("fuse_uring_cmd_req", size_of::<RingCommand>(), 24),
            ("fuse_uring_req_header", size_of::<RingHeader>(), 288),
        ];
        for (name, actual, expected) in sizes {
            assert_eq!(actual, expected, "{name}");
        }
    }

    #[test]
    fn fields_stand_where_the_kernel_header_has_them() {
        assert_eq!(offset_of!(InHeader, unique), 8);
        assert_eq!(offset_of!(InHeader, total_extlen), 36);
        assert_eq!(offset_of!(InitIn, flags2), 16);
        assert_eq!(offset_of!(InitOut, max_write), 20);
        assert_eq!(offset_of!(InitOut, max_pages), 28);
        assert_eq!(offset_of!(InitOut, flags2), 32);
        assert_eq!(offset_of!(InitOut, max_stack_depth), 36);
        assert_eq!(offset_of!(InitOut, request_timeout), 40);
        assert_eq!(offset_of!(SetattrIn, size), 16);
        assert_eq!(offset_of!(SetattrIn, mode), 68);
        assert_eq!(offset_of!(EntryOut, attr), 40);
        assert_eq!(offset_of!(CreateOut, open), 128);
        assert_eq!(offset_of!(OpenOut, backing_id), 12);
        assert_eq!(offset_of!(LkIn, lk), 16);
        assert_eq!(offset_of!(LkIn, lk_flags), 40);
        assert_eq!(offset_of!(FlushIn, lock_owner), 16);
        assert_eq!(offset_of!(WriteIn, write_flags), 20);
        assert_eq!(offset_of!(RingCommand, qid), 16);
        assert_eq!(offset_of!(RingHeader, op_in), 128);
        assert_eq!(offset_of!(RingHeader, entry), 256);
        assert_eq!(offset_of!(RingEntry, payload_sz), 16);
    }
}
