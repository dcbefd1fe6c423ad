//! The Linux file system calls behind [`super::Backing`].
