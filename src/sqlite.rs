//! SQLite's file formats.
