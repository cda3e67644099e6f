import DiskImage
import ImageConvert
import Testing

@Suite struct CopyPolicyTests {
    static let fresh = TargetTraits(granularity: 4096, readsAsZeroFrom: 0, placesInOrder: false)
    static let device = TargetTraits(granularity: 4096, readsAsZeroFrom: .max, placesInOrder: false)
    static let overlay = TargetTraits(
        granularity: 65536, readsAsZeroFrom: 1 << 20, hasBacking: true, placesInOrder: true)
    static let oldOverlay = TargetTraits(
        granularity: 65536, readsAsZeroFrom: 1 << 20, hasBacking: true, canWriteZeroes: false,
        placesInOrder: true)

    typealias Case = (
        target: TargetTraits, storesZeros: Bool, content: Mapping.Content, offset: Int64,
        action: CopyAction
    )

    @Test(
        arguments: [
            (fresh, false, .data, 0, .copy), (fresh, false, .zero, 0, .skip),
            (fresh, true, .zero, 0, .copy), (fresh, true, .data, 0, .copy),
            (device, false, .zero, 0, .zero), (device, true, .zero, 0, .copy),
            (device, false, .data, 0, .copy),
            (overlay, false, .unallocated, 0, .skip), (overlay, true, .unallocated, 0, .skip),
            (overlay, false, .zero, 0, .zero), (overlay, false, .zero, 1 << 20, .skip),
            (overlay, false, .data, 1 << 20, .copy),
            (oldOverlay, false, .zero, 0, .copy), (oldOverlay, false, .zero, 1 << 20, .skip),
        ] as [Case])
    func decides(_ given: Case) {
        let policy = CopyPolicy(target: given.target, storesZeros: given.storesZeros)
        #expect(policy.action(for: given.content, at: given.offset) == given.action)
    }
}
