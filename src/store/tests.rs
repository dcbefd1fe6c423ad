//! The store as a whole, over a real directory.

mod model;
mod support;
