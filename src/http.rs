//! The HTTP API and the replication stream.
