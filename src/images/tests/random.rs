//! Origins that fail in random ways, from a seed that is printed and taken back (`BEDPLATE_TEST_SEED`).

use super::{
    origin::{Answer, Origin, Pace},
    *,
};

const SEEDS: u64 = 24;
/// Most faults before an origin is good.
const FAULTS_MAX: u64 = 7;

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit).unwrap()
    }
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Cut(usize),
    Stall(usize),
    Trouble,
    Chunked(usize),
    NoRange(usize),
    WrongRange,
    /// The file is another one from now on.
    Changes,
}

fn fault(random: &mut Random, len: usize) -> Fault {
    let at = random.below(len as u64);
    match random.below(7) {
        0 => Fault::Stall(at),
        1 => Fault::Trouble,
        2 => Fault::Chunked(at),
        3 => Fault::NoRange(at),
        4 => Fault::WrongRange,
        5 => Fault::Changes,
        _ => Fault::Cut(at),
    }
}

fn run(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let len = 1 + random.below(3 << 20);
    let faults: Vec<Fault> = (0..random.below(FAULTS_MAX)).map(|_| fault(&mut random, len)).collect();
    let checksum = random.below(2) == 0;
    // All versions are equally long: lengths alone must not be what finds the change out.
    let versions: Vec<Vec<u8>> = (0..=FAULTS_MAX).map(|v| noise(len, seed * 100 + v)).collect();
    let last = faults.iter().filter(|fault| matches!(fault, Fault::Changes)).count();
    let wanted = versions[last].clone();
    let script = faults.clone();
    let origin = Origin::start(move |asked| {
        let done = asked.index.min(script.len());
        let version = script[..done].iter().filter(|fault| matches!(fault, Fault::Changes)).count();
        let (content, tag) = (&versions[version], format!("\"v{version}\""));
        let header = format!("etag: {tag}\r\n");
        let answer = Answer::file(asked, content, &tag);
        match script.get(asked.index) {
            None => answer,
            Some(Fault::Cut(at) | Fault::Stall(at)) if answer.body.is_empty() => answer.cut(*at),
            Some(Fault::Cut(at)) => answer.cut(*at),
            Some(Fault::Stall(at)) => answer.cut(*at).paced(Pace::Stall),
            Some(Fault::Trouble) => Answer::status("503 Busy"),
            Some(Fault::Chunked(at)) if asked.first() == 0 => Answer::chunked(content, &header, Some(*at)),
            Some(Fault::Chunked(at)) => answer.cut(*at),
            Some(Fault::NoRange(at)) => Answer::whole(content, &header).cut(*at),
            Some(Fault::WrongRange) if asked.first() > 1 => Answer::part(content, asked.first() / 2, &header),
            Some(Fault::WrongRange | Fault::Changes) => answer.cut(len / 2),
        }
    });
    let node = Node::new();
    let sum = checksum.then(|| sha512(&wanted));
    node.create("a", &origin.url("/a"), sum.as_deref()).unwrap();
    let context = || format!("seed {seed}: {len} bytes, {faults:?}");
    match node.wait("a") {
        Ok(info) => {
            let content = node.content("a");
            assert_eq!(info.sha512, Some(sha512(&content)), "{}", context());
            // An origin that was done before its last change delivered an earlier version, which is whole, too.
            let end = origin.seen().len();
            let changes = faults[..faults.len().min(end.saturating_sub(1))]
                .iter()
                .filter(|fault| matches!(fault, Fault::Changes))
                .count();
            assert!(content == noise(len, seed * 100 + changes as u64), "{}", context());
        }
        Err(Error::Failed { failure, .. }) => {
            // It was complete before the version that the checksum belongs to.
            assert_eq!(failure.code, FailureCode::Checksum, "{}: {}", context(), failure.message);
            assert!(checksum && origin.seen().len() <= faults.len(), "{}", context());
        }
        Err(error) => panic!("{}: {error}", context()),
    }
    let resumable =
        faults.iter().all(|fault| matches!(fault, Fault::Cut(_) | Fault::Stall(_) | Fault::Trouble));
    if resumable {
        let sent: usize = origin.seen().iter().map(|(_, sent)| sent).sum();
        assert_eq!(sent, len, "{}", context());
    }
}

#[test]
fn whatever_an_origin_does_the_image_is_one_whole_version_of_its_file() {
    if let Ok(seed) = std::env::var("BEDPLATE_TEST_SEED") {
        return run(seed.parse().unwrap());
    }
    for seed in 1..=SEEDS {
        println!("seed {seed}");
        run(seed);
    }
}
