//! POSIX access control lists: the kernel checks them, the backing file system keeps and inherits
//! them. What is left to us is the mode of a new file below a directory with a default list.

/// The attributes that go to the disk as they are: the backing file system knows them.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

pub(super) fn is_acl(name: &[u8]) -> bool {
    name == ACCESS || name == DEFAULT
}

/// The mode of a file created with `mode` under the default list `default`, as in
/// `posix_acl_create_masq` of the kernel. None when the bytes are no list.
pub(super) fn inherited_mode(mode: u32, default: &[u8]) -> Option<u32> {
    let (version, entries) = default.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % 8 != 0 {
        return None;
    }
    let (mut user, mut group, mut mask, mut other) = (7, 7, None, 7);
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        let perm = u32::from(u16::from_le_bytes([entry[2], entry[3]])) & 7;
        match tag {
            USER_OBJ => user = perm,
            GROUP_OBJ => group = perm,
            MASK => mask = Some(perm),
            OTHER => other = perm,
            _ => {}
        }
    }
    let allowed = user << 6 | mask.unwrap_or(group) << 3 | other;
    Some(mode & (allowed | !0o777))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, perm) in entries {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&perm.to_le_bytes());
            bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_default_list_limits_the_mode_and_the_mask_stands_for_the_group() {
        let plain = acl(&[(USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 0)]);
        assert_eq!(inherited_mode(0o666, &plain), Some(0o640));
        assert_eq!(inherited_mode(0o4777, &plain), Some(0o4750));
        let masked = acl(&[(USER_OBJ, 6), (0x02, 7), (GROUP_OBJ, 0), (MASK, 7), (OTHER, 4)]);
        assert_eq!(inherited_mode(0o777, &masked), Some(0o674));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        assert_eq!(inherited_mode(0o666, b""), None);
        assert_eq!(inherited_mode(0o666, &[3, 0, 0, 0]), None);
        assert_eq!(inherited_mode(0o666, &[2, 0, 0, 0, 1]), None);
    }
}
