//! Rows: the events as text, in the columns and the order of the real file.

use std::io::{self, Write};

use chrono::{NaiveDate, NaiveDateTime, NaiveTime, TimeDelta};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use uuid::fmt::Hyphenated;
use uuid::{Builder, Uuid};

use super::session::PRICE;
use super::shop::Shop;

/// The header of the events file.
pub(super) const HEADER: &str =
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n";

const DAY_SECONDS: u64 = 86_400;
const FIRST_MIDNIGHT: NaiveDateTime =
    NaiveDateTime::new(NaiveDate::from_ymd_opt(2019, 10, 1).expect("a date"), NaiveTime::MIN);
/// Relative number of rows in each hour of a day.
const HOUR_SHARES: [u64; 24] =
    [3, 3, 6, 12, 19, 25, 29, 31, 32, 32, 31, 30, 30, 31, 33, 36, 38, 37, 33, 26, 17, 10, 6, 4];

const FIRST_PRODUCT_ID: u64 = 1_000_000;
const FIRST_CATEGORY_ID: u64 = 2_053_013_550_000_000_000;
const CATEGORY_ID_STEP: u64 = 97_654_321;
const FIRST_USER_ID: u64 = 512_000_000;

/// One category in this many has no code.
const UNCODED_CATEGORY_ONE_IN: u32 = 3;
/// Products of a brand, on average.
const BRAND_ITEMS: u32 = 30;
/// Percentage of products without a brand.
const UNBRANDED_PERCENT: u32 = 14;

const CATEGORY_CODES: [&str; 32] = [
    "electronics.smartphone",
    "electronics.tablet",
    "electronics.clocks",
    "electronics.audio.headphone",
    "electronics.audio.speaker",
    "electronics.video.tv",
    "electronics.camera",
    "computers.notebook",
    "computers.desktop",
    "computers.monitor",
    "computers.printer",
    "computers.keyboard",
    "appliances.kitchen.kettle",
    "appliances.kitchen.oven",
    "appliances.kitchen.fridge",
    "appliances.kitchen.dishwasher",
    "appliances.washer",
    "appliances.vacuum",
    "appliances.iron",
    "apparel.shoes",
    "apparel.shirt",
    "apparel.jacket",
    "furniture.bedroom.bed",
    "furniture.living_room.sofa",
    "furniture.kitchen.table",
    "auto.tyres",
    "auto.player",
    "kids.carriage",
    "kids.toys",
    "sport.bicycle",
    "sport.treadmill",
    "construction.drill",
];

const SYLLABLES: [&str; 16] = [
    "ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "xu", "za",
];

/// Product, category, brand and price columns of every item, as text.
pub(super) struct Labels {
    text: Vec<u8>,
    /// `text[begins[item]..begins[item + 1]]` belongs to `item`.
    begins: Vec<usize>,
}

impl Labels {
    /// Draws prices and the items without a brand.
    pub(super) fn draw(shop: &Shop, rng: &mut ChaCha8Rng) -> io::Result<Self> {
        let mut text = Vec::new();
        let mut begins = vec![0];
        let n_brands = shop.n_items().div_ceil(BRAND_ITEMS);
        for item in 0..shop.n_items() {
            let category = shop.category(item);
            let category_id = FIRST_CATEGORY_ID + u64::from(category) * CATEGORY_ID_STEP;
            write!(text, "{},{category_id},", FIRST_PRODUCT_ID + u64::from(item))?;
            if !category.is_multiple_of(UNCODED_CATEGORY_ONE_IN) {
                text.extend_from_slice(
                    CATEGORY_CODES[category as usize % CATEGORY_CODES.len()].as_bytes(),
                );
            }
            text.push(b',');
            if rng.random_range(0..100u32) >= UNBRANDED_PERCENT {
                push_brand(rng.random_range(0..n_brands), &mut text);
            }
            let price = PRICE.draw(rng);
            write!(text, ",{}.{:02}", price / 100, price % 100)?;
            begins.push(text.len());
        }
        Ok(Self { text, begins })
    }

    fn of(&self, item: u32) -> &[u8] {
        &self.text[self.begins[item as usize]..self.begins[item as usize + 1]]
    }
}

/// A name of three syllables or more, different for each brand.
fn push_brand(brand: u32, text: &mut Vec<u8>) {
    let base = SYLLABLES.len() as u64;
    let mut number = u64::from(brand) + base * base;
    while number > 0 {
        text.extend_from_slice(SYLLABLES[(number % base) as usize].as_bytes());
        number /= base;
    }
}

/// The column `event_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventType {
    View,
    Cart,
    Purchase,
}

impl EventType {
    /// Draws the type of the next row where it stays with the same item.
    pub(super) fn after(self, rng: &mut ChaCha8Rng) -> Self {
        match (self, rng.random_range(0..100u32)) {
            (Self::Cart, 0..45) | (Self::View, 0..4) => Self::Purchase,
            (Self::View, 4..13) => Self::Cart,
            _ => Self::View,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Cart => "cart",
            Self::Purchase => "purchase",
        }
    }
}

/// Who acts in the rows of a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Visitor {
    user: u32,
    /// Random bits of the session's id; none in a row without `user_session`.
    session: Option<u128>,
}

impl Visitor {
    pub(super) fn draw(n_users: u32, has_session: bool, rng: &mut ChaCha8Rng) -> Self {
        Self { user: rng.random_range(0..n_users), session: has_session.then(|| rng.random()) }
    }
}

/// Writes rows in order of time.
pub(super) struct Rows<'a> {
    out: &'a mut dyn Write,
    labels: Labels,
    line: Vec<u8>,
    /// The second spelled in `time`, since the first midnight.
    second: u64,
    /// The second as the file writes it; kept because many rows share it.
    time: Vec<u8>,
}

impl<'a> Rows<'a> {
    /// Writes the header.
    pub(super) fn begin(labels: Labels, out: &'a mut dyn Write) -> io::Result<Self> {
        out.write_all(HEADER.as_bytes())?;
        let mut rows = Self { out, labels, line: Vec::new(), second: 0, time: Vec::new() };
        rows.spell_time()?;
        Ok(rows)
    }

    /// Writes one row; `second` counts from the first midnight and never goes back.
    pub(super) fn write(
        &mut self,
        second: u64,
        event_type: EventType,
        item: u32,
        visitor: &Visitor,
    ) -> io::Result<()> {
        if second != self.second {
            self.second = second;
            self.spell_time()?;
        }
        self.line.clear();
        self.line.extend_from_slice(&self.time);
        self.line.push(b',');
        self.line.extend_from_slice(event_type.name().as_bytes());
        self.line.push(b',');
        self.line.extend_from_slice(self.labels.of(item));
        write!(self.line, ",{},", FIRST_USER_ID + u64::from(visitor.user))?;
        if let Some(session) = visitor.session {
            let mut text = Uuid::encode_buffer();
            self.line.extend_from_slice(session_id(session).encode_lower(&mut text).as_bytes());
        }
        self.line.push(b'\n');
        self.out.write_all(&self.line)
    }

    fn spell_time(&mut self) -> io::Result<()> {
        self.time.clear();
        let time = FIRST_MIDNIGHT + TimeDelta::seconds(self.second as i64);
        write!(self.time, "{time} UTC")
    }
}

/// A random (version 4) UUID of these random bits.
fn session_id(bits: u128) -> Hyphenated {
    Builder::from_random_bytes(bits.to_be_bytes()).into_uuid().hyphenated()
}

/// Start of the session whose first row is row `row` of `n_rows`, in seconds since the first
/// midnight. Rows are spread evenly over `n_days` days, and over a day by [`HOUR_SHARES`].
pub(super) fn begin_second(row: u64, n_rows: u64, n_days: u32) -> u64 {
    let day_shares: u64 = HOUR_SHARES.iter().sum::<u64>() * 3600;
    let passed = u128::from(row) * u128::from(day_shares) * u128::from(n_days) / u128::from(n_rows);
    let (day, mut left) =
        ((passed / u128::from(day_shares)) as u64, (passed % u128::from(day_shares)) as u64);
    let mut hour = 0;
    while left >= HOUR_SHARES[hour] * 3600 {
        left -= HOUR_SHARES[hour] * 3600;
        hour += 1;
    }
    day * DAY_SECONDS + hour as u64 * 3600 + left / HOUR_SHARES[hour]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_begin_from_the_first_midnight_to_before_the_last() {
        assert_eq!(begin_second(0, 1000, 3), 0);
        let seconds: Vec<u64> = (0..1000).map(|row| begin_second(row, 1000, 3)).collect();
        assert!(seconds.is_sorted());
        assert!(seconds[999] < 3 * DAY_SECONDS);
        assert_eq!(seconds.iter().filter(|&&second| second / DAY_SECONDS == 1).count(), 333);
    }

    #[test]
    fn ids_and_names_are_well_formed_and_differ() {
        assert_eq!(session_id(u128::MAX).to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let names: std::collections::BTreeSet<Vec<u8>> = (0..5000)
            .map(|brand| {
                let mut name = Vec::new();
                push_brand(brand, &mut name);
                name
            })
            .collect();
        assert_eq!(names.len(), 5000);
    }
}
