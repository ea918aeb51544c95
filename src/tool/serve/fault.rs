//! What goes wrong, and how often.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Faults of the answers to blob requests. Text form: `latency=10,fail=0.1,status=503,corrupt=0.01,truncate=0.01,
/// stall=5,rate=100000,seed=1`, every part optional.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Time before the head of an answer (`latency`, milliseconds).
    pub latency: Duration,
    /// Probability of an error instead of the blob.
    pub fail: f64,
    /// Status of that error.
    pub status: u16,
    /// Probability that one bit of a body is wrong.
    pub corrupt: f64,
    /// Probability that a body ends, and the connection with it, half-way.
    pub truncate: f64,
    /// Time between the head and the body of an answer (`stall`, seconds).
    pub stall: Duration,
    /// Bytes per second of each body.
    pub rate: Option<u64>,
    /// Start of the random sequence: the same seed and order of requests meet the same faults.
    pub seed: u64,
}

impl Default for Fault {
    /// Nothing goes wrong.
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            fail: 0.0,
            status: 500,
            corrupt: 0.0,
            truncate: 0.0,
            stall: Duration::ZERO,
            rate: None,
            seed: 1,
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
            value
                .parse()
                .map_err(|_| format!("{key}={value:?} is not a number that makes sense"))
        }
        let probability = |key: &str, value: &str| -> Result<f64, String> {
            let p: f64 = number(key, value)?;
            if (0.0..=1.0).contains(&p) {
                Ok(p)
            } else {
                Err(format!("{key}={value} is not from 0 to 1"))
            }
        };
        let mut fault = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} has no ="))?;
            match key {
                "latency" => fault.latency = Duration::from_millis(number(key, value)?),
                "fail" => fault.fail = probability(key, value)?,
                "status" => {
                    fault.status = number(key, value)?;
                    if !(400..600).contains(&fault.status) {
                        return Err(format!("status={value} is not from 400 to 599"));
                    }
                }
                "corrupt" => fault.corrupt = probability(key, value)?,
                "truncate" => fault.truncate = probability(key, value)?,
                "stall" => {
                    fault.stall = Duration::try_from_secs_f64(number(key, value)?)
                        .map_err(|_| format!("stall={value} is not a time"))?;
                }
                "rate" => fault.rate = Some(number::<u64>(key, value)?).filter(|rate| *rate > 0),
                "seed" => fault.seed = number(key, value)?,
                _ => return Err(format!("unknown fault {key:?}")),
            }
        }
        Ok(fault)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "latency={},fail={},status={},corrupt={},truncate={},stall={},rate={},seed={}",
            self.latency.as_millis(),
            self.fail,
            self.status,
            self.corrupt,
            self.truncate,
            self.stall.as_secs_f64(),
            self.rate.unwrap_or(0),
            self.seed
        )
    }
}

/// A random sequence that can be repeated (SplitMix64).
pub(super) struct Dice(AtomicU64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    pub(super) fn reseed(&self, seed: u64) {
        self.0.store(seed, Ordering::Relaxed);
    }

    /// Any number.
    pub(super) fn next(&self) -> u64 {
        let mut z = self
            .0
            .fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed)
            .wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// True with this probability.
    pub(super) fn hits(&self, probability: f64) -> bool {
        probability > 0.0 && (self.next() >> 11) as f64 / ((1_u64 << 53) as f64) < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_value_agree() {
        let fault: Fault = "latency=10, fail=0.25,status=503,stall=1.5,rate=1000,seed=7"
            .parse()
            .unwrap();
        assert_eq!(fault.latency, Duration::from_millis(10));
        assert_eq!(
            (fault.fail, fault.status, fault.rate, fault.seed),
            (0.25, 503, Some(1000), 7)
        );
        assert_eq!(fault.stall, Duration::from_millis(1500));
        assert_eq!(fault.to_string().parse(), Ok(fault));
        assert_eq!("".parse(), Ok(Fault::default()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "fail=2",
            "fail",
            "latency=-1",
            "status=200",
            "stall=nan",
            "speed=1",
            "corrupt=NaN",
        ] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn dice_repeat_themselves_and_hit_about_as_often_as_asked() {
        let roll = |seed| {
            let dice = Dice::new(seed);
            (0..1000).map(|_| dice.hits(0.3)).collect::<Vec<_>>()
        };
        assert_eq!(roll(5), roll(5));
        assert_ne!(roll(5), roll(6));
        let hits = roll(5).into_iter().filter(|hit| *hit).count();
        assert!((250..350).contains(&hits), "{hits}");
        let dice = Dice::new(1);
        assert!((0..1000).all(|_| dice.hits(1.0)) && !(0..1000).any(|_| dice.hits(0.0)));
    }
}
