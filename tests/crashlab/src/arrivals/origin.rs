//! Where the images of a simulated machine come from: known bytes, and how badly they are delivered.

use bedplate::prep::{
    arrival::{Arrival, Opening},
    failure::{Failure, Result},
    partial::Proof,
    source::{Source, Validator},
};
use bedplate_engine::exec::simulated::Seed;
use sha2::{Digest, Sha256, Sha512};

use super::script::{End, Manner};
use crate::{turns, world::index};

/// Blocks of 4 KiB of the largest image.
const BLOCKS_MAX: u64 = 10;
const BLOCK: usize = 4096;
/// Bytes of the longest part that comes at once.
const PART_MAX: u64 = 7000;

/// One state of a file at its origin.
#[derive(Clone, Debug)]
pub struct Version {
    pub bytes: Vec<u8>,
    pub sha512: String,
    /// What the origin says that it is, where it says it.
    validator: Validator,
}

/// A file at its origin, as it was and is.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The oldest first.
    pub versions: Vec<Version>,
    /// What is asked for: the sum of the first version.
    pub expected: Option<String>,
    pub says_length: bool,
    /// Whether what is kept can be proven to be of the same file.
    pub says_validator: bool,
}

impl Origin {
    pub fn new(seed: &mut Seed) -> Origin {
        let mut origin = Origin {
            versions: Vec::new(),
            expected: None,
            says_length: !seed.one_in(4),
            says_validator: !seed.one_in(3),
        };
        origin.change(seed);
        origin.expected = match seed.below(4) {
            0 => None,
            1 => Some(format!("sha256:{}", hex(&Sha256::digest(&origin.newest().bytes)))),
            _ => Some(format!("sha512:{}", origin.newest().sha512)),
        };
        origin
    }

    /// From now on it is another file, and says so if it ever says anything.
    pub fn change(&mut self, seed: &mut Seed) {
        let bytes = content(seed);
        let sha512 = hex(&Sha512::digest(&bytes));
        let validator = match self.says_validator {
            true => Validator::Etag(format!("\"{}\"", &sha512[..16])),
            false => Validator::None,
        };
        self.versions.push(Version { bytes, sha512, validator });
    }

    pub fn newest(&self) -> &Version {
        self.versions.last().expect("there is one from the start")
    }
}

/// Blocks with data, blocks of zeros, blocks that begin or end with zeros; mostly an odd length.
fn content(seed: &mut Seed) -> Vec<u8> {
    let blocks = 1 + seed.below(BLOCKS_MAX);
    let mut bytes = Vec::with_capacity(index(blocks) * BLOCK);
    for _ in 0..blocks {
        let mut block: Vec<u8> = (0..BLOCK / 8).flat_map(|_| seed.number().to_le_bytes()).collect();
        let cut = seed.index(BLOCK);
        match seed.below(6) {
            0 | 1 => block.fill(0),
            2 => block[..cut].fill(0),
            3 => block[cut..].fill(0),
            _ => {}
        }
        bytes.extend(block);
    }
    bytes.truncate(bytes.len() - [0, 0, seed.index(BLOCK)][seed.index(3)]);
    // No format's magic begins like that.
    bytes[0] = 1;
    bytes
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One run of a source.
#[derive(Debug)]
pub struct LabSource {
    version: Version,
    says_length: bool,
    manner: Manner,
    pub seen: Seen,
}

/// What became of a run.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Where the arrival asked to go on, at first.
    pub from: Option<u64>,
    /// Where it was at the end.
    pub position: u64,
    /// A wrong byte was delivered.
    pub lied: bool,
    /// It ended before its end, or went on after it.
    pub broke: bool,
}

impl LabSource {
    /// What nobody could notice does not happen: wrong bytes where no sum is expected, an end that nobody was told of.
    pub fn new(origin: &Origin, manner: Manner) -> LabSource {
        let says_length = origin.says_length;
        let end = match manner.end {
            End::Short if !says_length => End::Breaks,
            End::Long if !says_length => End::Whole,
            end => end,
        };
        let wrong = manner.wrong.filter(|_| origin.expected.is_some());
        let manner = Manner { end, wrong, ..manner };
        LabSource { version: origin.newest().clone(), says_length, manner, seen: Seen::default() }
    }

    fn deliver(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
        let len = self.version.bytes.len() as u64;
        let end = u64::from(self.manner.at) * len / 256;
        while arrival.position() < len {
            let at = arrival.position();
            if self.manner.end != End::Whole && at >= end && !self.seen.broke {
                self.seen.broke = true;
                self.break_off(arrival)?;
                if self.manner.end == End::Short {
                    return Ok(());
                }
            }
            turns::others_live();
            let part = 1 + turns::choose(index(PART_MAX.min(len - at))) as u64;
            let mut bytes = self.version.bytes[index(at)..index(at + part)].to_vec();
            if let Some(wrong) = self.manner.wrong.map(|wrong| u64::from(wrong) * len / 256)
                && (at..at + part).contains(&wrong)
            {
                self.seen.lied = true;
                bytes[index(wrong - at)] ^= 0x55;
            }
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            if zeros == bytes.len() {
                arrival.zeros(part)?;
            } else {
                arrival.bytes(&bytes)?;
            }
        }
        if self.manner.end == End::Long {
            self.seen.broke = true;
            return arrival.bytes(&[1; 100]);
        }
        Ok(())
    }

    fn break_off(&self, arrival: &mut Arrival<'_>) -> Result<()> {
        match self.manner.end {
            End::Breaks => Err(Failure::Source("it broke off".to_owned())),
            End::Stalls => Err(Failure::TimedOut("nothing came".to_owned())),
            End::NodeStops => {
                arrival.stop().stop();
                Ok(())
            }
            End::Cancelled => {
                arrival.stop().cancel();
                Ok(())
            }
            End::Whole | End::Short | End::Long => Ok(()),
        }
    }
}

impl Source for LabSource {
    fn transfer(&mut self, arrival: &mut Arrival<'_>) -> Result<()> {
        let (position, len) = (arrival.position(), self.version.bytes.len() as u64);
        self.seen.from.get_or_insert(position);
        let own = self.version.validator.clone();
        if position > 0 {
            let same = own != Validator::None && *arrival.validator() == own;
            let nothing_said = own == Validator::None
                && *arrival.validator() == Validator::None
                && arrival.proof() == Proof::NotNeeded;
            if position > len {
                arrival.restart()?;
            } else if same {
                arrival.proven();
            } else if nothing_said && arrival.expected().is_some() {
                arrival.join_unproven();
            } else {
                arrival.restart()?;
            }
        }
        let total = self.says_length.then_some(len);
        arrival.begin(Opening { total, needed_bytes: None, validator: own })?;
        let result = self.deliver(arrival);
        self.seen.position = arrival.position();
        result
    }
}
