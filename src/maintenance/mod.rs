//! Work on a volume as a whole: it takes long, can be interrupted, and shows how far it is.
//!
//! Here is what finds the files, keeps the list and chooses the speed. What must not go wrong on
//! the disk is the store's business, and nothing here knows the format but by its decoders.
//!
//! [`rotate_deks`] works on a mounted volume, [`check`] on one that nobody has mounted.

pub mod check;
pub mod rotate_deks;
