//! The store as a whole, over a real directory.

mod checkpoint;
mod concurrency;
mod crash;
mod cutoff;
mod fault;
mod format;
mod log_change;
mod model;
mod recovery;
mod rotation;
mod space;
mod support;
mod tamper;
mod volume;
mod volume_key;
