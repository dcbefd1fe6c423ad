//! Records of a file that are authentic and wrong: what a mistake would write, and no disk does.
//! Made by docs/FORMAT.md, not by the code that is tested.

use std::path::Path;

use super::support::{KEY, PAGE, SECTOR, Volume, get, put};
use crate::crypto::mac::{MAC_LEN, MacKey};
use crate::crypto::secret::Secret;
use crate::crypto::{kdf, wrap};
use crate::store::Store;

/// In a file's header.
pub(super) const SIZE_AT: usize = 56;
pub(super) const RUNS_AT: usize = 78;
pub(super) const MAC_KEY_AT: usize = 144;
pub(super) const SLOTS_AT: usize = 192;

pub(super) const TAGS: &[u8; 16] = b"byokfs tags 1\0\0\0";
pub(super) const GROUPS: &[u8; 16] = b"byokfs groups 1\0";

fn derive(label: &str, context: &[u8]) -> Secret<32> {
    let volume_key = Secret::new_with(|key: &mut [u8; 32]| key.fill(KEY)).unwrap();
    kdf::derive(&volume_key, &[], label, context).unwrap()
}

fn uuid(volume: &Volume) -> [u8; 16] {
    Store::inspect(&*volume.backing()).unwrap().uuid
}

fn seal(key: &Secret<32>, bound: &[&[u8]], record: &mut [u8]) {
    let parts = [bound, &[&record[MAC_LEN..]]].concat();
    let mac = MacKey::new(key).unwrap().mac(&parts);
    record[..MAC_LEN].copy_from_slice(&mac);
}

/// A header with `change`, as it goes to either page.
pub(super) fn header(volume: &Volume, file: &Path, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut record = get(file, 0, SECTOR as usize);
    change(&mut record);
    let key = derive("byokfs file header mac v1", &[]);
    seal(&key, &[b"byokfs header 1\0", &uuid(volume)], &mut record);
    record
}

/// The same in the place of both copies.
pub(super) fn put_header(volume: &Volume, file: &Path, change: impl FnOnce(&mut [u8])) {
    let record = header(volume, file, change);
    put(file, 0, &record);
    put(file, PAGE, &record);
}

pub(super) fn generation(file: &Path) -> u64 {
    u64::from_le_bytes(get(file, 48, 8).try_into().unwrap())
}

/// The sector at that position, with `change`.
pub(super) fn sector(
    volume: &Volume,
    file: &Path,
    at: u64,
    domain: &[u8; 16],
    change: impl FnOnce(&mut [u8]),
) {
    let id = get(file, 32, 16);
    let wrapped = get(file, MAC_KEY_AT as u64, wrap::WRAPPED_LEN).try_into().unwrap();
    let kek = derive("byokfs file mac wrap v1", &id);
    let key = wrap::unwrap(&kek, &wrapped).unwrap().unwrap();
    let mut record = get(file, at, SECTOR as usize);
    change(&mut record);
    seal(&key, &[domain, &uuid(volume), &id], &mut record);
    put(file, at, &record);
}
