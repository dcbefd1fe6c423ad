//! Every `unsafe` of byokfs, each with its reason. Nothing here knows of files, keys or formats.

pub mod alloc;
pub mod fuse;
pub mod locked;
pub mod peer;
pub mod signals;
pub mod stack;
pub mod stdio;
pub mod uring;
pub mod writeout;
