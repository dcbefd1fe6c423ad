//! The clock of everything that must not outlive a key check.
//!
//! CLOCK_BOOTTIME goes on while the machine is suspended; `std::time::Instant` stops, so a
//! laptop or a paused virtual machine would wake up with an old permission still fresh.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A point on CLOCK_BOOTTIME, in nanoseconds since the machine booted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootTime(u64);

impl BootTime {
    /// Before every other point: a permission that was never given.
    pub const ZERO: BootTime = BootTime(0);

    pub fn now() -> BootTime {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        BootTime(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
    }

    pub const fn from_nanos(nanos: u64) -> BootTime {
        BootTime(nanos)
    }

    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero if that is in the future.
    pub fn since(self, earlier: BootTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Time left until `self`; zero once it has passed.
    pub fn remaining(self) -> Duration {
        self.since(BootTime::now())
    }
}

impl Add<Duration> for BootTime {
    type Output = BootTime;

    fn add(self, time: Duration) -> BootTime {
        BootTime(self.0.saturating_add(nanos(time)))
    }
}

impl Sub<Duration> for BootTime {
    type Output = BootTime;

    fn sub(self, time: Duration) -> BootTime {
        BootTime(self.0.saturating_sub(nanos(time)))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl fmt::Debug for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boot+{}.{:03}s", self.0 / 1_000_000_000, self.0 / 1_000_000 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_forward_and_saturates() {
        let start = BootTime::now();
        assert!(start > BootTime::ZERO);
        assert!(BootTime::now() >= start);
        let far = start + Duration::MAX;
        assert_eq!(far.as_nanos(), u64::MAX);
        assert_eq!(BootTime::ZERO - Duration::from_secs(1), BootTime::ZERO);
        assert_eq!(start.since(start + Duration::from_secs(1)), Duration::ZERO);
        assert_eq!((start + Duration::from_secs(2)).since(start), Duration::from_secs(2));
    }
}
