//! File names and file calls of the mount to databases of the engine.
