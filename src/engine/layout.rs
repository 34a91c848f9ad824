//! Where the files of a node and of a database stand.
//!
//! ```text
//! DATA/lock                      locked (flock) by the process that uses the directory
//! DATA/clusterid                 the cluster id and a newline
//! DATA/node-ids                  the ids that this node has had
//! DATA/lease                     the session of a lease that this node has, and a newline
//! DATA/term                      the last primaryship that it has reached, and what lacks something of it
//! DATA/restoring                 empty: not all of the backup is here yet
//! DATA/super-journals/           super-journals of transactions over several databases
//! DATA/dbs/NAME/database         SQLite's main file
//! DATA/dbs/NAME/journal          the rollback journal
//! DATA/dbs/NAME/wal              the write-ahead log
//! DATA/dbs/NAME/shm              the wal-index, made anew at each start
//! DATA/dbs/NAME/checksums        the page checksums of a cleanly closed database
//! DATA/dbs/NAME/backup           what the backup confirmed last
//! DATA/dbs/NAME/halt             empty: this node has borrowed the right to write here
//! DATA/dbs/NAME/ltx/MIN-MAX.ltx  the chain
//! DATA/dbs/NAME/ltx/MIN-MAX.positions  what lies inside a file of several transactions
//! DATA/dbs/NAME/lost+found/      what could not stay in the chain; never deleted by us
//! ```

use std::path::{Path, PathBuf};

use ltx::Txid;

/// The directory of one node.
#[derive(Debug, Clone)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The layout below `path`.
    pub fn new(path: &Path) -> DataDir {
        DataDir(path.to_owned())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The file that is locked by the process that uses the directory.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// The file that holds the cluster id.
    pub fn cluster_id(&self) -> PathBuf {
        self.0.join("clusterid")
    }

    /// The file with the ids that this node has had, a line each.
    pub fn node_ids(&self) -> PathBuf {
        self.0.join("node-ids")
    }

    /// The file with the session of the lease that this node has.
    pub fn lease(&self) -> PathBuf {
        self.0.join("lease")
    }

    /// The file with the last primaryship that this node has reached.
    pub fn term(&self) -> PathBuf {
        self.0.join("term")
    }

    /// There while a node without data gets what its backup has.
    pub fn restoring(&self) -> PathBuf {
        self.0.join("restoring")
    }

    /// The directory that holds a directory for each database.
    pub fn databases(&self) -> PathBuf {
        self.0.join("dbs")
    }

    /// The directory of super-journals, by their name in the mount.
    pub fn super_journals(&self) -> PathBuf {
        self.0.join("super-journals")
    }

    /// The directory of the database `name`, which must be a valid database name.
    pub fn database(&self, name: &str) -> DbDir {
        DbDir(self.databases().join(name))
    }
}

/// The directory of one database.
#[derive(Debug, Clone)]
pub struct DbDir(PathBuf);

impl DbDir {
    /// The layout below `path`, the directory of one database.
    pub fn new(path: &Path) -> DbDir {
        DbDir(path.to_owned())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What the backup confirmed last.
    pub fn backup(&self) -> PathBuf {
        self.0.join("backup")
    }

    /// There if a HALT lock was ever used here on a replica.
    pub fn halt(&self) -> PathBuf {
        self.0.join("halt")
    }

    /// SQLite's main file.
    pub fn database(&self) -> PathBuf {
        self.0.join("database")
    }

    /// The rollback journal.
    pub fn journal(&self) -> PathBuf {
        self.0.join("journal")
    }

    /// The write-ahead log.
    pub fn wal(&self) -> PathBuf {
        self.0.join("wal")
    }

    /// The wal-index.
    pub fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    /// The saved page checksums.
    pub fn checksums(&self) -> PathBuf {
        self.0.join("checksums")
    }

    /// The directory of the chain.
    pub fn ltx(&self) -> PathBuf {
        self.0.join("ltx")
    }

    /// The LTX file of the transactions from `min` to `max`.
    pub fn ltx_file(&self, min: Txid, max: Txid) -> PathBuf {
        self.0.join("ltx").join(format!("{min}-{max}.ltx"))
    }

    /// The directory of what was set aside.
    pub fn lost_found(&self) -> PathBuf {
        self.0.join("lost+found")
    }
}
