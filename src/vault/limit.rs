//! How many requests the vault takes: a bucket that fills evenly and holds ten seconds' worth, as the
//! real service counts.

use std::time::Instant;

use crate::sync::Mutex;

const WINDOW_SECONDS: f64 = 10.0;

#[derive(Debug)]
pub(crate) struct RateLimit(Option<Mutex<Bucket>>);

#[derive(Debug)]
struct Bucket {
    capacity: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.tokens = (self.tokens + elapsed * self.capacity / WINDOW_SECONDS).min(self.capacity);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

impl RateLimit {
    /// In ten seconds; None: any number.
    pub(crate) fn new(requests: Option<u32>) -> RateLimit {
        RateLimit(requests.map(|requests| {
            let capacity = f64::from(requests.max(1));
            Mutex::new(Bucket { capacity, tokens: capacity, filled: Instant::now() })
        }))
    }

    pub(crate) fn take(&self) -> bool {
        self.0.as_ref().is_none_or(|bucket| bucket.lock().take(Instant::now()))
    }

    /// Seconds until one more fits.
    pub(crate) fn retry_after(&self) -> u64 {
        match &self.0 {
            None => 1,
            // At most ten.
            Some(bucket) => (WINDOW_SECONDS / bucket.lock().capacity).ceil().max(1.0) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_empties_and_fills_again() {
        let start = Instant::now();
        let mut bucket = Bucket { capacity: 5.0, tokens: 5.0, filled: start };
        let taken =
            |bucket: &mut Bucket, at: Duration| (0..20).filter(|_| bucket.take(start + at)).count();
        assert_eq!(taken(&mut bucket, Duration::ZERO), 5);
        assert_eq!(taken(&mut bucket, Duration::from_secs(2)), 1);
        assert_eq!(taken(&mut bucket, Duration::from_secs(6)), 2);
        assert_eq!(taken(&mut bucket, Duration::from_secs(600)), 5);
        assert!(RateLimit::new(None).take());
        assert_eq!(RateLimit::new(Some(2)).retry_after(), 5);
    }
}
