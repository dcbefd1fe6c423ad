//! Reads a volume as docs/FORMAT.md says, by nothing but its offsets and labels.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};

use super::support::{Volume, keyring, pattern};
use crate::crypto::mac::MacKey;
use crate::crypto::secret::Secret;
use crate::crypto::{kdf, wrap};
use crate::store::file::Durability;

fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn mac(label: &str) -> MacKey {
    MacKey::new(&keyring().derive(label, &[]).unwrap()).unwrap()
}

fn unwrapped(label: &str, file_id: &[u8], wrapped: &[u8]) -> Secret<32> {
    let kek = keyring().derive(label, file_id).unwrap();
    wrap::unwrap(&kek, wrapped.try_into().unwrap()).unwrap().unwrap()
}

#[test]
fn a_volume_is_what_the_format_says() {
    let volume = Volume::new();
    let data = pattern(125 * 4096 + 10, 3);
    let file = volume.create("f");
    file.write_at(&data, 0, Durability::default()).unwrap();
    file.punch_hole(4096, 4096).unwrap();
    drop(file);
    volume.store.checkpoint().unwrap();

    let header = std::fs::read(volume.root().join("volume")).unwrap();
    assert_eq!(header.len(), 8192);
    assert_eq!(header[..4096], header[4096..]);
    assert_eq!(&header[32..40], b"BYOKFSVL");
    assert_eq!((le(&header, 40, 4), le(&header, 44, 4), le(&header, 48, 8)), (1, 4096, 0));
    let uuid = header[64..80].to_vec();
    assert_eq!(le(&header, 88, 4), 1, "volume key");
    let made = mac("byokfs volume mac v1").mac(&[b"byokfs volume 1\0", &header[32..496]]);
    assert_eq!(header[496..512], made);
    drop(unwrapped("byokfs metadata key wrap v1", &uuid, &header[112..152]));
    let sum = ring::digest::digest(&ring::digest::SHA256, &header[32..512]);
    assert_eq!(header[..32], *sum.as_ref());

    let sessions = std::fs::read(volume.root().join("sessions.a")).unwrap();
    assert_eq!(sessions, std::fs::read(volume.root().join("sessions.b")).unwrap());
    let made =
        mac("byokfs session table mac v1").mac(&[b"byokfs sessions1", &uuid, &sessions[16..]]);
    assert_eq!(sessions[..16], made);
    assert_eq!((&sessions[16..24], le(&sessions, 28, 4)), (&b"BYOKSESS"[..], 1));
    assert_eq!(le(&sessions, 40, 4), 1, "volume key");
    assert_eq!(le(&sessions, 44, 4), 2, "the next session");
    assert_eq!((sessions.len(), le(&sessions, 64, 4)), (64 + 40, 1));
    assert_eq!(le(&sessions, 68, 4), 1, "volume key of its log records");
    let salt = &sessions[72..104];

    let disk = std::fs::read(volume.path("f")).unwrap();
    assert_eq!(disk.len(), 8192 + 4096 + 495_616 + 4096 + 6 * 4096);
    assert_eq!(disk[..4096], disk[4096..8192]);
    let made = mac("byokfs file header mac v1").mac(&[b"byokfs header 1\0", &uuid, &disk[16..512]]);
    assert_eq!(disk[..16], made);
    assert_eq!((&disk[16..24], le(&disk, 24, 4)), (&b"BYOKFILE"[..], 1));
    let file_id = &disk[32..48];
    let generation = le(&disk, 48, 8);
    assert_eq!(le(&disk, 56, 8), data.len() as u64);
    assert_eq!((le(&disk, 76, 2), le(&disk, 78, 2)), (0, 1));
    assert_eq!((le(&disk, 80, 4), le(&disk, 84, 4)), (0, 1), "one run: region 0");
    assert_eq!((le(&disk, 192, 2), le(&disk, 194, 2)), (0, 1), "DEK slot 0 is in use");
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!((now - 60..=now).contains(&le(&disk, 240, 8)), "when it was made");
    let mac_key = unwrapped("byokfs file mac wrap v1", file_id, &disk[144..184]);
    let mac_key = MacKey::new(&mac_key).unwrap();
    let dek = unwrapped("byokfs dek wrap v1", file_id, &disk[200..240]);

    let check_page = |at: usize, domain: &[u8], index: u64| {
        for sector in 0..8 {
            let bytes = &disk[at + sector * 512..][..512];
            let made = mac_key.mac(&[domain, &uuid, file_id, &bytes[16..]]);
            assert_eq!(bytes[..16], made, "page at {at}, sector {sector}");
            assert_eq!(le(bytes, 16, 8), generation, "page at {at}, sector {sector}");
            assert_eq!(le(bytes, 24, 8), index * 8 + sector as u64);
        }
    };
    check_page(8192, b"byokfs groups 1\0", 0);
    assert_eq!((le(&disk, 8192 + 32, 8), le(&disk, 8192 + 40, 8)), (generation, generation));
    assert_eq!(le(&disk, 8192 + 48, 8), 0, "no third group");

    let key = kdf::derive(&dek, salt, "byokfs block key v1", file_id).unwrap();
    let cipher = Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key.expose()));
    for group in 0..2 {
        let tags = 12_288 + group * 495_616;
        check_page(tags, b"byokfs tags 1\0\0\0", group as u64);
        for index in 0..120 {
            let block = group * 120 + index;
            let entry = &disk[tags + index / 15 * 512 + 32 + index % 15 * 32..][..32];
            if block == 1 || block > 125 {
                assert_eq!(entry, [0; 32], "block {block} is a hole");
                continue;
            }
            assert_eq!((le(entry, 24, 4), le(entry, 28, 2), le(entry, 30, 2)), (1, 0, 1));
            let nonce: [u8; 12] = [&entry[24..28], &entry[16..24]].concat().try_into().unwrap();
            let mut aad = b"BKB1\0\0\0\0".to_vec();
            aad.extend_from_slice(file_id);
            aad.extend_from_slice(&(block as u64).to_le_bytes());
            let sealed = [&disk[tags + 4096 + index * 4096..][..4096], &entry[..16]].concat();
            let payload = Payload { msg: &sealed, aad: &aad };
            let mut want = data[block * 4096..data.len().min(block * 4096 + 4096)].to_vec();
            want.resize(4096, 0);
            assert_eq!(cipher.decrypt(&Nonce::from(nonce), payload).unwrap(), want);
        }
    }
}
