import Foundation

/// Some of the cases of a test whose cases are many and much alike, evenly spread from the first
/// on. `SWIMG_ALL_CASES` in the environment asks for all of them.
public func some<Case>(_ count: Int, of all: [Case]) -> [Case] {
    guard count < all.count, ProcessInfo.processInfo.environment["SWIMG_ALL_CASES"] == nil else {
        return all
    }
    return (0..<count).map { all[$0 * all.count / count] }
}

/// Some of the pairs of two kinds of cases, five of nine.
public func some<First, Second>(
    of first: some Collection<First>, with second: some Collection<Second>
) -> [(First, Second)] {
    let all = first.flatMap { one in second.map { (one, $0) } }
    return some(all.count * 5 / 9, of: all)
}
