//! A search of all memory of a process, as root, for keys.
//!
//! Keys are looked for raw, in hex, in base64 and in base64url. Key schedules need no key to be
//! known: 240 bytes are an AES-256 schedule if each word follows from the ones before it.

use std::fs;
use std::os::unix::fs::FileExt;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

const CHUNK: usize = 1 << 20;
/// Longer than anything that is searched for.
const OVERLAP: usize = 256;
const SCHEDULE: usize = 240;

pub struct Needle {
    pub name: String,
    pub key: Vec<u8>,
}

/// Shown by a failing test as it is.
#[allow(dead_code)]
#[derive(Debug)]
pub struct Finding {
    /// "NAME, FORM", or "AES-256 key schedule, FORM".
    pub what: String,
    pub address: u64,
    pub region: String,
}

/// Everything that the process maps and can read.
pub fn scan(pid: i32, needles: &[Needle]) -> Vec<Finding> {
    let patterns = Patterns::new(needles);
    let sbox = sbox();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(!maps.is_empty(), "process {pid} has no memory to scan");
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, mode) = (fields.next().unwrap(), fields.next().unwrap());
        let region = fields.nth(3).unwrap_or("anonymous").to_owned();
        if !mode.starts_with('r') || region.starts_with("[v") {
            continue;
        }
        let (from, to) = range.split_once('-').unwrap();
        let from = u64::from_str_radix(from, 16).unwrap();
        let to = u64::from_str_radix(to, 16).unwrap();
        let mut note = |what: String, address: u64| {
            found.push(Finding { what, address, region: region.clone() });
        };
        let mut at = from;
        while at < to {
            let len = (to - at).min((CHUNK + OVERLAP) as u64) as usize;
            let mut bytes = vec![0; len];
            // A region may go away, or end in a page that no file backs, while it is read.
            let len = read_all(&memory, &mut bytes, at);
            bytes.truncate(len);
            // What begins in the overlap belongs to the next chunk.
            let limit = if len > CHUNK { CHUNK } else { len };
            patterns.search(&bytes, limit, |what, offset| note(what, at + offset as u64));
            schedules(&bytes, limit, &sbox, |form, offset| {
                note(format!("AES-256 key schedule, {form}"), at + offset as u64);
            });
            at += CHUNK as u64;
        }
    }
    found
}

fn read_all(memory: &fs::File, bytes: &mut [u8], at: u64) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match memory.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) | Err(_) => break,
            Ok(read) => done += read,
        }
    }
    done
}

/// What is searched for, and what to call it.
struct Patterns(Vec<(String, memchr::memmem::Finder<'static>)>);

impl Patterns {
    fn new(needles: &[Needle]) -> Patterns {
        let mut patterns = Vec::new();
        for Needle { name, key } in needles {
            let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
            for (form, bytes) in [
                ("raw", key.clone()),
                ("hex", hex.clone().into_bytes()),
                ("HEX", hex.to_uppercase().into_bytes()),
                ("base64", STANDARD_NO_PAD.encode(key).into_bytes()),
                ("base64url", URL_SAFE_NO_PAD.encode(key).into_bytes()),
            ] {
                let finder = memchr::memmem::Finder::new(&bytes).into_owned();
                patterns.push((format!("{name}, {form}"), finder));
            }
        }
        Patterns(patterns)
    }

    fn search(&self, bytes: &[u8], limit: usize, mut found: impl FnMut(String, usize)) {
        for (what, finder) in &self.0 {
            for offset in finder.find_iter(bytes).take_while(|offset| *offset < limit) {
                found(what.clone(), offset);
            }
        }
    }
}

/// Calls `found` for each AES-256 schedule that begins before `limit`: as bytes in memory order, as
/// words in the host's order, and as the round keys of the equivalent inverse cipher.
///
/// The loop looks at every word of a process in a build without optimisation, so it is kept
/// primitive: one byte of the ninth word decides whether to look closer.
fn schedules(bytes: &[u8], limit: usize, sbox: &[u8; 256], mut found: impl FnMut(&str, usize)) {
    const PAGE: usize = 4096;
    let zeros = [0; PAGE];
    let mut double = [0; 256];
    for (value, double) in double.iter_mut().enumerate() {
        *double = self::double(value as u8);
    }
    let mut at = 0;
    while at < limit && at + SCHEDULE <= bytes.len() {
        // Most memory is zero. What begins in the last words of a page may go on in the next one.
        if at % PAGE == 0 && at + PAGE <= bytes.len() && bytes[at..at + PAGE] == zeros {
            at += PAGE - 32;
            continue;
        }
        if bytes[at + 32] == bytes[at] ^ sbox[bytes[at + 29] as usize] ^ 1 {
            let window = &bytes[at..at + SCHEDULE];
            if follows(|index| word(window, index), sbox) {
                found("bytes", at);
            }
        }
        if bytes[at + 35] == bytes[at + 3] ^ sbox[bytes[at + 30] as usize] ^ 1 {
            let window = &bytes[at..at + SCHEDULE];
            if follows(|index| swapped(word(window, index)), sbox) {
                found("words", at);
            }
        }
        if at % 16 == 0 {
            // The first column of the third round key, and the last of the second.
            let (a, b, c, d) = (bytes[at + 192], bytes[at + 193], bytes[at + 194], bytes[at + 195]);
            let ninth = double[a as usize] ^ double[b as usize] ^ b ^ c ^ d;
            let (a, b, c, d) = (bytes[at + 220], bytes[at + 221], bytes[at + 222], bytes[at + 223]);
            let eighth = double[b as usize] ^ double[c as usize] ^ c ^ d ^ a;
            if ninth == bytes[at + 224] ^ sbox[eighth as usize] ^ 1 {
                let window = &bytes[at..at + SCHEDULE];
                let inverse = |index: usize| {
                    let (round, column) = (index / 4, index % 4);
                    let key = word(window, (14 - round) * 4 + column);
                    if round == 0 || round == 14 { key } else { mix_column(key) }
                };
                if follows(inverse, sbox) {
                    found("inverse", at);
                }
            }
        }
        at += 4;
    }
}

fn word(window: &[u8], index: usize) -> [u8; 4] {
    [window[index * 4], window[index * 4 + 1], window[index * 4 + 2], window[index * 4 + 3]]
}

/// FIPS 197, 5.2: does every word from the ninth on follow from those before?
fn follows(word: impl Fn(usize) -> [u8; 4], sbox: &[u8; 256]) -> bool {
    let mut rcon = 1u8;
    for index in 8..60 {
        let mut last = word(index - 1);
        if index % 8 == 0 {
            last.rotate_left(1);
            last = last.map(|byte| sbox[usize::from(byte)]);
            last[0] ^= rcon;
            rcon = double(rcon);
        } else if index % 8 == 4 {
            last = last.map(|byte| sbox[usize::from(byte)]);
        }
        let first = word(index - 8);
        if word(index) != std::array::from_fn(|byte| first[byte] ^ last[byte]) {
            return false;
        }
    }
    true
}

fn swapped(mut word: [u8; 4]) -> [u8; 4] {
    word.reverse();
    word
}

/// In GF(2^8) of AES.
fn double(value: u8) -> u8 {
    value << 1 ^ if value & 0x80 != 0 { 0x1b } else { 0 }
}

fn mix_column(a: [u8; 4]) -> [u8; 4] {
    std::array::from_fn(|i| {
        let (b, c, d) = (a[(i + 1) % 4], a[(i + 2) % 4], a[(i + 3) % 4]);
        double(a[i]) ^ double(b) ^ b ^ c ^ d
    })
}

fn sbox() -> [u8; 256] {
    let mut sbox = [0x63; 256];
    // 3 generates the field; its powers and their inverses run in opposite directions.
    let (mut power, mut inverse) = (1u8, 1u8);
    loop {
        power ^= double(power);
        inverse ^= inverse << 1;
        inverse ^= inverse << 2;
        inverse ^= inverse << 4;
        if inverse & 0x80 != 0 {
            inverse ^= 0x09;
        }
        let affine = (1..5).fold(inverse, |sum, shift| sum ^ inverse.rotate_left(shift));
        sbox[usize::from(power)] = affine ^ 0x63;
        if power == 1 {
            return sbox;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(key: &[u8; 32]) -> Vec<u8> {
        let sbox = sbox();
        let mut words: Vec<[u8; 4]> = key.chunks(4).map(|word| word.try_into().unwrap()).collect();
        let mut rcon = 1;
        for index in 8..60 {
            let mut last = words[index - 1];
            if index % 8 == 0 {
                last = [last[1], last[2], last[3], last[0]].map(|byte| sbox[usize::from(byte)]);
                last[0] ^= rcon;
                rcon = double(rcon);
            } else if index % 8 == 4 {
                last = last.map(|byte| sbox[usize::from(byte)]);
            }
            words.push(std::array::from_fn(|byte| words[index - 8][byte] ^ last[byte]));
        }
        words.concat()
    }

    /// FIPS 197, A.3.
    const KEY: [u8; 32] = [
        0x60, 0x3d, 0xeb, 0x10, 0x15, 0xca, 0x71, 0xbe, 0x2b, 0x73, 0xae, 0xf0, 0x85, 0x7d, 0x77,
        0x81, 0x1f, 0x35, 0x2c, 0x07, 0x3b, 0x61, 0x08, 0xd7, 0x2d, 0x98, 0x10, 0xa3, 0x09, 0x14,
        0xdf, 0xf4,
    ];

    #[test]
    fn a_schedule_is_seen_in_each_form_and_noise_is_not() {
        let bytes = expand(&KEY);
        assert_eq!(bytes[32..36], [0x9b, 0xa3, 0x54, 0x11]);
        assert_eq!(bytes[236..], [0x70, 0x6c, 0x63, 0x1e]);
        let words: Vec<u8> =
            bytes.chunks(4).flat_map(|word| swapped(word.try_into().unwrap())).collect();
        // The inverse of mix_column is itself, three times.
        let unmix = |word| mix_column(mix_column(mix_column(word)));
        let inverse: Vec<u8> = (0..60)
            .flat_map(|index| {
                let (round, column) = (index / 4, index % 4);
                let from = ((14 - round) * 4 + column) * 4;
                let word: [u8; 4] = bytes[from..from + 4].try_into().unwrap();
                if round == 0 || round == 14 { word } else { unmix(word) }
            })
            .collect();
        for (form, schedule) in [("bytes", bytes), ("words", words), ("inverse", inverse)] {
            let mut memory: Vec<u8> = (0..1000u32).map(|at| ((at * at) >> 3) as u8).collect();
            memory[400..400 + SCHEDULE].copy_from_slice(&schedule);
            let mut found = Vec::new();
            schedules(&memory, memory.len(), &sbox(), |form, at| found.push((form.to_owned(), at)));
            assert_eq!(found, [(form.to_owned(), 400)]);
            memory[500] ^= 1;
            schedules(&memory, memory.len(), &sbox(), |_, _| panic!("a schedule in noise"));
        }
    }

    #[test]
    fn this_process_is_searched_in_every_form() {
        let key: Vec<u8> = (0..32).map(|byte| byte * 7 + 1).collect();
        let needles = [Needle { name: "key".to_owned(), key: key.clone() }];
        let held = [
            key.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            STANDARD_NO_PAD.encode(&key),
            URL_SAFE_NO_PAD.encode(&key),
        ];
        let schedule = expand(&KEY);
        let found = scan(std::process::id() as i32, &needles);
        for form in ["raw", "hex", "base64", "base64url"] {
            let what = format!("key, {form}");
            assert!(found.iter().any(|finding| finding.what == what), "{what}");
        }
        assert!(found.iter().any(|finding| finding.what.starts_with("AES-256")));
        drop((held, schedule));
    }
}
